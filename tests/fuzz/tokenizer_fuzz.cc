// A sentencepiece model; the text to encode with it, and a tokenizer_config.json, follow it. The
// last two bytes say how long each is.
#include "tests/fuzz/tokenizer_use.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace longspan;
  if (size < 2) return 0;
  absl::string_view model(reinterpret_cast<const char*>(data), size - 2);
  const size_t config_size = std::min<size_t>(data[size - 1], model.size());
  const absl::string_view config = model.substr(model.size() - config_size);
  model.remove_suffix(config_size);
  const absl::string_view text =
      model.substr(model.size() - std::min<size_t>(data[size - 2], model.size()));
  model.remove_suffix(text.size());
  const auto tokenizer = Tokenizer::FromSentencePieceModel(model, config);
  return tokenizer.ok() && !testing::TokenizerKeepsItsLaws(**tokenizer, text) ? 1 : 0;
}
