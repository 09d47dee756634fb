// One safetensors file.
#include "models/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto tensors = longspan::ParseSafetensors({reinterpret_cast<const std::byte*>(data), size},
                                                  "fuzz.safetensors");
  if (!tensors.ok()) return 0;
  size_t bytes = 0;
  for (const longspan::TensorInfo& tensor : *tensors) {
    for (const std::byte b : tensor.data) bytes += static_cast<size_t>(b) & 1;
  }
  return bytes > size ? 1 : 0;
}
