#pragma once
// From a file's own description of its vocabulary to a checked Vocabulary. Files are hostile: what
// the sentencepiece library would not survive, or would read otherwise than the reference, is
// refused here.
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "models/checkpoint.h"
#include "models/sentencepiece_bridge.h"

namespace longspan {

// A vocabulary and the rules around it.
struct TokenizerSpec {
  Vocabulary vocabulary;
  std::vector<bool> marker;  // by id: control tokens, and user-defined ones that mark structure
  std::vector<int> eos;      // end of sequence and end of turn, ascending, no duplicates
  bool add_bos = false;
  std::string chat_template;  // Jinja text, may be empty
};

// InvalidArgument names the piece, its id and the rule.
absl::Status ValidateVocabulary(const Vocabulary& vocabulary);

// A serialized sentencepiece ModelProto, with the overrides of tokenizer_config.json (may be
// empty): bos_token, eos_token, add_bos_token, chat_template, and added_tokens_decoder for ids that
// the model has. Added tokens beyond the model's pieces are left out: no supported family has rows
// for them.
absl::StatusOr<TokenizerSpec> SpecFromSentencePieceModel(absl::string_view serialized,
                                                         absl::string_view tokenizer_config_json);

// tokenizer.ggml.* of a GGUF whose tokenizer.ggml.model is "llama" (sentencepiece BPE).
absl::StatusOr<TokenizerSpec> SpecFromGgufTokenizer(const GgufMetadata& metadata);

}  // namespace longspan
