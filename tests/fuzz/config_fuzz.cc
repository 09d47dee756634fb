// config.json, and behind a NUL generation_config.json.
#include <cstdlib>

#include "models/family.h"
#include "tests/support/full_op_table.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace longspan;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const size_t cut = std::min(text.find('\0'), size);
  const auto spec = SpecFromConfigJson(text.substr(0, cut), text.substr(std::min(cut + 1, size)));
  if (!spec.ok()) return 0;
  if (!spec->Validate().ok()) std::abort();
  Describe(*spec, testing::FullOpTable(), DType::kBF16, spec->max_context);
  SlotsOf(*spec, Checkpoint::Format::kSafetensors);
  return 0;
}
