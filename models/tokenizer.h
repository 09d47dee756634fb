#pragma once
// Text to token ids and back, by sentencepiece: from a .model file or from the vocabulary inside a
// GGUF. Immutable after creation and safe from any thread; a TokenStream belongs to one thread.
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "models/checkpoint.h"

namespace longspan {

struct TokenizerSpec;  // models/tokenizer_vocabulary.h

class Tokenizer {
 public:
  // tokenizer.model of a directory, or tokenizer.ggml.* of a GGUF; hostile input is refused.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Create(const Checkpoint& checkpoint);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromSentencePieceModel(
      absl::string_view serialized, absl::string_view tokenizer_config_json);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromGguf(const GgufMetadata& metadata);
  ~Tokenizer();

  struct EncodeOptions {
    bool add_bos = true;  // only if the checkpoint's own setting says so (add_bos_token())
    // Control tokens in the text, and user-defined ones that mark structure (<|doc|>,
    // <start_of_turn>), become their ids; otherwise they are text. User-defined tokens that are
    // text (runs of newlines, HTML tags) always become their ids.
    bool parse_special = true;
  };
  // Any bytes: as in the sentencepiece library, each byte that is not UTF-8 counts as U+FFFD. Time
  // is n log n in the text's bytes, memory about 100 bytes for each: callers bound the text.
  std::vector<int32_t> Encode(absl::string_view text, EncodeOptions options) const;
  std::vector<int32_t> Encode(absl::string_view text) const {
    return Encode(text, EncodeOptions());
  }

  // Text of all ids. Broken UTF-8 (a cut byte-fallback run) becomes U+FFFD for each byte. Ids
  // outside the vocabulary (rows that pad an embedding table) have no text.
  std::string Decode(absl::Span<const int32_t> ids, bool skip_special) const;

  // Bytes of one token as it appears inside running text ("▁" as a space, <0xAB> as that byte).
  std::string Piece(int32_t id) const;
  bool IsSpecial(int32_t id) const;  // control tokens and markers (not user-defined text)
  // Where `text` first spells a token that parse_special would take, and which.
  std::optional<std::pair<size_t, int32_t>> FindSpecialText(absl::string_view text) const;
  int vocab_size() const;
  int bos() const;               // -1: none
  std::vector<int> eos() const;  // end of sequence (and end of turn where the checkpoint has one)
  bool add_bos_token() const;
  int FindToken(absl::string_view piece) const;  // -1: none; exact piece such as "<start_of_turn>"
  const std::string& chat_template() const;  // Jinja text as the checkpoint ships it; may be empty
  const char* kind() const;                  // "sentencepiece-bpe" or "sentencepiece-unigram"

 private:
  Tokenizer();
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromSpec(TokenizerSpec spec);
  struct Impl;
  std::unique_ptr<Impl> impl_;
  friend class TokenStream;
};

// Incremental detokenization: the concatenation of all Append()s and Flush() equals Decode() of all
// ids, and every piece returned is valid UTF-8 (bytes of an unfinished character are held back).
class TokenStream {
 public:
  TokenStream(const Tokenizer& tokenizer, bool skip_special);
  std::string Append(int32_t id);
  std::string Flush();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_;
  bool at_start_ = true;
  std::string held_;
};

}  // namespace longspan
