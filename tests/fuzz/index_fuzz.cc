// model.safetensors.index.json.
#include <cstdlib>

#include "models/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto index = longspan::ParseSafetensorsIndex({reinterpret_cast<const char*>(data), size},
                                                     "fuzz.index.json");
  if (!index.ok()) return 0;
  for (const auto& [name, file] : *index) {
    if (file.find('/') != std::string::npos || file[0] == '.') std::abort();
  }
  return 0;
}
