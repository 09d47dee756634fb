// One GGUF file and the spec in its metadata.
#include "models/family.h"
#include "models/gguf.h"
#include "tests/support/full_op_table.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace longspan;
  const auto file = ParseGguf({reinterpret_cast<const std::byte*>(data), size}, "fuzz.gguf");
  if (!file.ok()) return 0;
  size_t ones = 0;
  for (const TensorInfo& tensor : file->tensors) {
    for (const std::byte b : tensor.data) ones += static_cast<size_t>(b) & 1;
  }
  const auto spec = SpecFromGguf(file->metadata);
  if (spec.ok()) {
    Describe(*spec, testing::FullOpTable(), DType::kBF16, spec->max_context);
    SlotsOf(*spec, Checkpoint::Format::kGguf);
  }
  return ones > size ? 1 : 0;
}
