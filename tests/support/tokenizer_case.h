#pragma once
// Small vocabularies for the tokenizer tests, as GGUF metadata.
#include <string>
#include <vector>

#include "absl/strings/str_format.h"
#include "models/checkpoint.h"

namespace longspan::testing {

// <unk>, <bos>, <eos>, all 256 bytes, then `pieces` as normal tokens of falling score.
inline GgufMetadata SmallGguf(const std::vector<std::string>& pieces) {
  std::vector<std::string> tokens = {"<unk>", "<bos>", "<eos>"};
  std::vector<double> scores = {0, 0, 0};
  std::vector<int64_t> types = {2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    tokens.push_back(absl::StrFormat("<0x%02X>", byte));
    scores.push_back(0);
    types.push_back(6);
  }
  for (const std::string& piece : pieces) {
    scores.push_back(-static_cast<double>(tokens.size()));
    tokens.push_back(piece);
    types.push_back(1);
  }
  GgufMetadata metadata;
  metadata["tokenizer.ggml.model"] = std::string("llama");
  metadata["tokenizer.ggml.tokens"] = tokens;
  metadata["tokenizer.ggml.scores"] = scores;
  metadata["tokenizer.ggml.token_type"] = types;
  metadata["tokenizer.ggml.bos_token_id"] = uint64_t{1};
  metadata["tokenizer.ggml.eos_token_id"] = uint64_t{2};
  metadata["tokenizer.ggml.unknown_token_id"] = uint64_t{0};
  metadata["tokenizer.ggml.add_space_prefix"] = false;
  return metadata;
}
constexpr int kFirstPiece = 259;  // id of pieces[0]

}  // namespace longspan::testing
