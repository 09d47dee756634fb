#pragma once
// The sentencepiece library behind plain std types. Its header declares absl::string_view as
// another type than abseil's, so only sentencepiece_bridge.cc includes it, and this header includes
// no abseil.
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace longspan {

// Numbers as in sentencepiece_model.proto, which GGUF's token_type array uses too.
enum class PieceType : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

struct VocabularyPiece {
  std::string text;  // spaces as U+2581
  float score = 0;
  PieceType type = PieceType::kNormal;
};

// What of a sentencepiece model decides ids and text; the index of a piece is its id.
struct Vocabulary {
  enum class Algorithm : uint8_t { kUnigram = 1, kBpe = 2, kWord = 3, kChar = 4 };
  Algorithm algorithm = Algorithm::kBpe;
  std::vector<VocabularyPiece> pieces;
  bool byte_fallback = false;
  bool add_dummy_prefix = false;
  bool remove_extra_whitespaces = false;
  bool escape_whitespaces = true;
  bool whitespace_is_suffix = false;
  bool has_character_map = false;  // normalization or denormalization rules
  std::string unknown_surface = " \xE2\x81\x87 ";
  int bos = -1;
  int eos = -1;
};

// Immutable after Create; safe from any thread.
class SentencePiece {
 public:
  // The fields of a serialized ModelProto, as the file has them. False when it is not one.
  static bool Parse(std::string_view serialized, Vocabulary* vocabulary);

  // REQUIRES: ValidateVocabulary(vocabulary). nullptr and the library's reason in `error` if it
  // still refuses.
  static std::unique_ptr<SentencePiece> Create(const Vocabulary& vocabulary, std::string* error);
  ~SentencePiece();

  // Appends the ids of `text`. User-defined pieces are matched first, control pieces never.
  void Encode(std::string_view text, std::vector<int32_t>* ids) const;
  // The id of a piece of any type by its exact text; -1 when there is none.
  int32_t Find(std::string_view piece) const;

 private:
  struct Impl;
  explicit SentencePiece(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longspan
