// The vocabulary inside a GGUF file; its bytes are also the text.
#include "models/gguf.h"
#include "tests/fuzz/tokenizer_use.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace longspan;
  const auto file = ParseGguf({reinterpret_cast<const std::byte*>(data), size}, "fuzz.gguf");
  if (!file.ok()) return 0;
  const auto tokenizer = Tokenizer::FromGguf(file->metadata);
  const absl::string_view text(reinterpret_cast<const char*>(data), std::min<size_t>(size, 500));
  return tokenizer.ok() && !testing::TokenizerKeepsItsLaws(**tokenizer, text) ? 1 : 0;
}
