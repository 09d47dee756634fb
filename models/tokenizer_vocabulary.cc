#include "models/tokenizer_vocabulary.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "models/checkpoint_json.h"
#include "models/utf8.h"

namespace longspan {
namespace {

constexpr size_t kMaxPieces = size_t{1} << 21;  // the largest vocabularies in use have 2^18
constexpr size_t kMaxPieceBytes = 1024;         // bounds the library's recursion over unused pieces
constexpr int kMaxNestedPieces = 64;            // size of the library's table of matched prefixes
constexpr size_t kMaxModelBytes = size_t{64} << 20;

// Tokens that end a turn, in the checkpoints that have them.
constexpr absl::string_view kEndOfTurn[] = {"<end_of_turn>", "<|end|>", "<|eot_id|>", "<|im_end|>"};
constexpr absl::string_view kTurnMarkers[] = {"<start_of_turn>", "<end_of_turn>"};

std::string Quote(absl::string_view piece) {
  return absl::StrCat("\"", absl::Utf8SafeCEscape(piece.substr(0, 40)), "\"");
}

absl::Status PieceError(size_t id, const VocabularyPiece& piece, absl::string_view why) {
  return absl::InvalidArgumentError(absl::StrCat("token ", id, " ", Quote(piece.text), ": ", why));
}

// Characters of `text`; nullopt when it is not UTF-8.
std::optional<int> CountCharacters(absl::string_view text) {
  int count = 0;
  while (!text.empty()) {
    const size_t length = Utf8Length({text.data(), text.size()});
    if (length == 0) return std::nullopt;
    text.remove_prefix(length);
    ++count;
  }
  return count;
}

bool IsBytePiece(absl::string_view text) {
  return text.size() == 6 && absl::StartsWith(text, "<0x") && text[5] == '>' &&
         absl::string_view("0123456789ABCDEF").find(text[3]) != absl::string_view::npos &&
         absl::string_view("0123456789ABCDEF").find(text[4]) != absl::string_view::npos;
}

absl::Status ValidatePiece(size_t id, const VocabularyPiece& piece) {
  const std::string& text = piece.text;
  if (text.empty()) return PieceError(id, piece, "is empty");
  if (text.size() > kMaxPieceBytes) {
    return PieceError(id, piece,
                      absl::StrCat("has ", text.size(), " bytes, the limit is ", kMaxPieceBytes));
  }
  if (text.find('\0') != std::string::npos) return PieceError(id, piece, "holds a NUL byte");
  const std::optional<int> characters = CountCharacters(text);
  if (!characters) return PieceError(id, piece, "is not UTF-8");
  if (!std::isfinite(piece.score)) {
    return PieceError(id, piece, absl::StrCat("score ", piece.score, " is not a finite number"));
  }
  const int type = static_cast<int>(piece.type);
  if (type < 1 || type > 6) {
    return PieceError(id, piece, absl::StrCat("type ", type, " is not one of 1 to 6"));
  }
  const bool reserved = piece.type == PieceType::kUnknown || piece.type == PieceType::kControl;
  if (reserved && *characters == 1) {  // plain text could spell it
    return PieceError(id, piece, "a control or unknown token must be longer than one character");
  }
  if (piece.type == PieceType::kByte && !IsBytePiece(text)) {
    return PieceError(id, piece, "a byte token must read <0x00> to <0xFF>");
  }
  return absl::OkStatus();
}

// How many user-defined pieces begin some user-defined piece, at most: all of them may match at
// once.
absl::Status ValidateNesting(const Vocabulary& vocabulary) {
  std::vector<absl::string_view> sorted;
  for (const VocabularyPiece& piece : vocabulary.pieces) {
    if (piece.type == PieceType::kUserDefined) sorted.push_back(piece.text);
  }
  std::sort(sorted.begin(), sorted.end());
  std::vector<absl::string_view> open;  // each begins the next
  for (const absl::string_view text : sorted) {
    while (!open.empty() && !absl::StartsWith(text, open.back())) open.pop_back();
    open.push_back(text);
    if (open.size() > kMaxNestedPieces) {
      return absl::InvalidArgumentError(
          absl::StrCat("user-defined token ", Quote(text), " begins with ", open.size() - 1,
                       " others, the limit is ", kMaxNestedPieces - 1));
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateTokenId(absl::string_view name, int id, size_t pieces) {
  if (id >= -1 && id < static_cast<int64_t>(pieces)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", id, ", the vocabulary has ", pieces, " tokens"));
}

bool IsMarkerText(absl::string_view text) {
  if (text.size() > 4 && absl::StartsWith(text, "<|") && absl::EndsWith(text, "|>")) return true;
  return std::find(std::begin(kTurnMarkers), std::end(kTurnMarkers), text) !=
         std::end(kTurnMarkers);
}

// Fills spec.marker, retypes marking pieces as control (so that plain text never becomes one) and
// collects what ends a sequence. `special`: ids that the checkpoint calls special.
void Finish(const absl::flat_hash_set<int>& special, TokenizerSpec* spec) {
  Vocabulary& vocabulary = spec->vocabulary;
  spec->marker.assign(vocabulary.pieces.size(), false);
  for (size_t id = 0; id < vocabulary.pieces.size(); ++id) {
    VocabularyPiece& piece = vocabulary.pieces[id];
    if (piece.type == PieceType::kUserDefined &&
        (IsMarkerText(piece.text) || special.contains(static_cast<int>(id)))) {
      piece.type = PieceType::kControl;
    }
    spec->marker[id] = piece.type == PieceType::kControl;
    const bool ends_turn =
        std::find(std::begin(kEndOfTurn), std::end(kEndOfTurn), piece.text) != std::end(kEndOfTurn);
    if (spec->marker[id] && ends_turn) spec->eos.push_back(static_cast<int>(id));
  }
  if (vocabulary.eos >= 0) spec->eos.push_back(vocabulary.eos);
  std::sort(spec->eos.begin(), spec->eos.end());
  spec->eos.erase(std::unique(spec->eos.begin(), spec->eos.end()), spec->eos.end());
}

// --- tokenizer_config.json ---

using Json = nlohmann::json;

absl::StatusOr<std::optional<bool>> BoolField(const Json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return std::nullopt;
  if (!it->is_boolean()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokenizer_config.json: ", key, " is a ", it->type_name(), ", not a boolean"));
  }
  return it->get<bool>();
}

// A token is a string or an object with "content"; empty when absent or null.
absl::StatusOr<std::string> TokenField(const Json& config, const char* key) {
  const auto it = config.find(key);
  if (it == config.end() || it->is_null()) return "";
  if (it->is_string()) return it->get<std::string>();
  if (it->is_object()) {
    const auto content = it->find("content");
    if (content != it->end() && content->is_string()) return content->get<std::string>();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer_config.json: ", key, " is a ", it->type_name(), ", not a token"));
}

int FindPiece(const Vocabulary& vocabulary, absl::string_view text) {
  const auto it = std::find_if(vocabulary.pieces.begin(), vocabulary.pieces.end(),
                               [&](const VocabularyPiece& piece) { return piece.text == text; });
  return it == vocabulary.pieces.end() ? -1 : static_cast<int>(it - vocabulary.pieces.begin());
}

absl::Status OverrideToken(const Json& config, const char* key, const Vocabulary& vocabulary,
                           int* id) {
  absl::StatusOr<std::string> text = TokenField(config, key);
  if (!text.ok()) return text.status();
  if (text->empty()) return absl::OkStatus();
  *id = FindPiece(vocabulary, *text);
  if (*id >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer_config.json: ", key, " ", Quote(*text), " is not in the vocabulary"));
}

// {"105": {"content": "<start_of_turn>", "special": true}, …} names pieces anew and says which
// mark.
absl::Status ReadAddedTokens(const Json& config, Vocabulary* vocabulary,
                             absl::flat_hash_set<int>* special) {
  const auto added = config.find("added_tokens_decoder");
  if (added == config.end() || added->is_null()) return absl::OkStatus();
  if (!added->is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokenizer_config.json: added_tokens_decoder is a ", added->type_name(),
                     ", not an object"));
  }
  for (const auto& [key, value] : added->items()) {
    int id = -1;
    if (!absl::SimpleAtoi(key, &id) || id < 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          "tokenizer_config.json: added_tokens_decoder has key ", Quote(key), ", not a token id"));
    }
    const auto content = value.is_object() ? value.find("content") : value.end();
    if (!value.is_object() || content == value.end() || !content->is_string()) {
      return absl::InvalidArgumentError(absl::StrCat("tokenizer_config.json: added_tokens_decoder[",
                                                     id, "] has no \"content\" string"));
    }
    if (id >= static_cast<int64_t>(vocabulary->pieces.size())) continue;
    absl::StatusOr<std::optional<bool>> is_special = BoolField(value, "special");
    if (!is_special.ok()) return is_special.status();
    VocabularyPiece& piece = vocabulary->pieces[id];
    piece.text = content->get<std::string>();
    if (piece.type == PieceType::kNormal || piece.type == PieceType::kUnused) {
      piece.type = PieceType::kUserDefined;
    }
    if (is_special->value_or(false)) special->insert(id);
  }
  return absl::OkStatus();
}

absl::Status ReadChatTemplate(const Json& config, std::string* chat_template) {
  const auto it = config.find("chat_template");
  if (it == config.end() || it->is_null()) return absl::OkStatus();
  if (it->is_string()) {
    *chat_template = it->get<std::string>();
    return absl::OkStatus();
  }
  if (it->is_array()) {  // several, by name
    for (const Json& entry : *it) {
      if (entry.is_object() && entry.value("name", Json()) == "default" &&
          entry.value("template", Json()).is_string()) {
        *chat_template = entry["template"].get<std::string>();
      }
    }
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("tokenizer_config.json: chat_template is a ",
                                                 it->type_name(), ", not a string"));
}

absl::Status ApplyConfig(absl::string_view text, TokenizerSpec* spec,
                         absl::flat_hash_set<int>* special) {
  absl::StatusOr<Json> config = ParseJsonObject(text, "tokenizer_config.json", JsonLimits{});
  if (!config.ok()) return config.status();
  Vocabulary& vocabulary = spec->vocabulary;
  if (absl::Status s = ReadAddedTokens(*config, &vocabulary, special); !s.ok()) return s;
  if (absl::Status s = OverrideToken(*config, "bos_token", vocabulary, &vocabulary.bos); !s.ok()) {
    return s;
  }
  if (absl::Status s = OverrideToken(*config, "eos_token", vocabulary, &vocabulary.eos); !s.ok()) {
    return s;
  }
  absl::StatusOr<std::optional<bool>> add_bos = BoolField(*config, "add_bos_token");
  if (!add_bos.ok()) return add_bos.status();
  spec->add_bos = add_bos->value_or(spec->add_bos);
  return ReadChatTemplate(*config, &spec->chat_template);
}

// --- GGUF ---

template <typename T>
constexpr const char* kTypeName = "";
template <>
constexpr const char* kTypeName<std::string> = "a string";
template <>
constexpr const char* kTypeName<bool> = "a boolean";
template <>
constexpr const char* kTypeName<std::vector<std::string>> = "an array of strings";
template <>
constexpr const char* kTypeName<std::vector<double>> = "an array of floats";

absl::Status WrongType(absl::string_view key, absl::string_view wanted) {
  return absl::InvalidArgumentError(absl::StrCat(key, " is not ", wanted));
}

// nullptr when the key is absent.
template <typename T>
absl::StatusOr<const T*> Find(const GgufMetadata& metadata, absl::string_view key) {
  const auto it = metadata.find(std::string(key));
  if (it == metadata.end()) return nullptr;
  const T* value = std::get_if<T>(&it->second);
  if (value == nullptr) return WrongType(key, kTypeName<T>);
  return value;
}

template <typename T>
absl::StatusOr<const T*> Require(const GgufMetadata& metadata, absl::string_view key) {
  absl::StatusOr<const T*> value = Find<T>(metadata, key);
  if (value.ok() && *value == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(key, " is missing"));
  }
  return value;
}

absl::StatusOr<int> TokenId(const GgufMetadata& metadata, absl::string_view key) {
  const auto it = metadata.find(std::string(key));
  if (it == metadata.end()) return -1;
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  if (const auto* u = std::get_if<uint64_t>(&it->second)) {
    if (*u <= static_cast<uint64_t>(kMax)) return static_cast<int>(*u);
    if (*u == std::numeric_limits<uint32_t>::max()) return -1;  // llama.cpp's "none"
    return absl::InvalidArgumentError(absl::StrCat(key, " is ", *u, ", the limit is ", kMax));
  }
  if (const auto* i = std::get_if<int64_t>(&it->second)) {
    if (*i >= -1 && *i <= kMax) return static_cast<int>(*i);
    return absl::InvalidArgumentError(absl::StrCat(key, " is ", *i, ", the limit is ", kMax));
  }
  return WrongType(key, "an integer");
}

absl::StatusOr<std::vector<int64_t>> Integers(const GgufMetadata& metadata, absl::string_view key) {
  const auto it = metadata.find(std::string(key));
  if (it == metadata.end()) return absl::InvalidArgumentError(absl::StrCat(key, " is missing"));
  if (const auto* i = std::get_if<std::vector<int64_t>>(&it->second)) return *i;
  if (const auto* u = std::get_if<std::vector<uint64_t>>(&it->second)) {
    std::vector<int64_t> out;
    for (const uint64_t value : *u)
      out.push_back(static_cast<int64_t>(std::min<uint64_t>(value, 255)));
    return out;
  }
  return WrongType(key, "an array of integers");
}

absl::Status ReadPieces(const GgufMetadata& metadata, Vocabulary* vocabulary) {
  const auto tokens = Require<std::vector<std::string>>(metadata, "tokenizer.ggml.tokens");
  if (!tokens.ok()) return tokens.status();
  const auto scores = Require<std::vector<double>>(metadata, "tokenizer.ggml.scores");
  if (!scores.ok()) return scores.status();
  const auto types = Integers(metadata, "tokenizer.ggml.token_type");
  if (!types.ok()) return types.status();
  const size_t n = (*tokens)->size();
  if ((*scores)->size() != n || types->size() != n) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokenizer.ggml.tokens has ", n, " entries, scores ", (*scores)->size(),
                     ", token_type ", types->size(), "; they must be equal"));
  }
  vocabulary->pieces.reserve(n);
  for (size_t id = 0; id < n; ++id) {
    const int64_t type = (*types)[id];
    if (type < 1 || type > 6) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer.ggml.token_type[", id, "] is ", type, ", not one of 1 to 6"));
    }
    VocabularyPiece piece{(**tokens)[id], static_cast<float>((**scores)[id]),
                          static_cast<PieceType>(type)};
    // The converters write user-defined tokens as plain text, the library has U+2581 for a space.
    if (piece.type == PieceType::kUserDefined) {
      piece.text = absl::StrReplaceAll(piece.text, {{" ", "\xE2\x96\x81"}});
    }
    vocabulary->byte_fallback |= piece.type == PieceType::kByte;
    vocabulary->pieces.push_back(std::move(piece));
  }
  return absl::OkStatus();
}

// Converters may give <unk> the type of a control token and name its id instead.
absl::Status SetUnknown(int unknown, Vocabulary* vocabulary) {
  if (absl::Status s =
          ValidateTokenId("tokenizer.ggml.unknown_token_id", unknown, vocabulary->pieces.size());
      !s.ok()) {
    return s;
  }
  if (unknown >= 0) vocabulary->pieces[unknown].type = PieceType::kUnknown;
  return absl::OkStatus();
}

absl::Status ReadFlag(const GgufMetadata& metadata, absl::string_view key, bool* flag) {
  const auto value = Find<bool>(metadata, key);
  if (!value.ok()) return value.status();
  if (*value != nullptr) *flag = **value;
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateVocabulary(const Vocabulary& vocabulary) {
  const size_t n = vocabulary.pieces.size();
  if (n == 0 || n > kMaxPieces) {
    return absl::InvalidArgumentError(
        absl::StrCat("the vocabulary has ", n, " tokens, it must have 1 to ", kMaxPieces));
  }
  if (vocabulary.algorithm != Vocabulary::Algorithm::kBpe &&
      vocabulary.algorithm != Vocabulary::Algorithm::kUnigram) {
    return absl::InvalidArgumentError(
        absl::StrCat("sentencepiece model type ", static_cast<int>(vocabulary.algorithm),
                     " is not supported; 1 (unigram) and 2 (BPE) are"));
  }
  if (vocabulary.has_character_map) {
    return absl::InvalidArgumentError(
        "the sentencepiece model has normalization rules (precompiled_charsmap), which are not "
        "supported");
  }
  if (vocabulary.whitespace_is_suffix) {
    return absl::InvalidArgumentError(
        "the sentencepiece model has treat_whitespace_as_suffix, which is not supported");
  }
  absl::flat_hash_map<absl::string_view, size_t> seen;
  seen.reserve(n);
  int unknown = 0, bytes = 0;
  for (size_t id = 0; id < n; ++id) {
    const VocabularyPiece& piece = vocabulary.pieces[id];
    if (absl::Status s = ValidatePiece(id, piece); !s.ok()) return s;
    const auto [first, is_new] = seen.try_emplace(piece.text, id);
    if (!is_new) return PieceError(id, piece, absl::StrCat("is also token ", first->second));
    unknown += piece.type == PieceType::kUnknown;
    bytes += piece.type == PieceType::kByte;
  }
  if (unknown != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("the vocabulary has ", unknown, " unknown tokens, it must have 1"));
  }
  const int wanted_bytes = vocabulary.byte_fallback ? 256 : 0;
  if (bytes != wanted_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("the vocabulary has ", bytes, " byte tokens, it must have ", wanted_bytes));
  }
  if (absl::Status s = ValidateTokenId("the beginning-of-sequence token", vocabulary.bos, n);
      !s.ok()) {
    return s;
  }
  if (absl::Status s = ValidateTokenId("the end-of-sequence token", vocabulary.eos, n); !s.ok()) {
    return s;
  }
  return ValidateNesting(vocabulary);
}

absl::StatusOr<TokenizerSpec> SpecFromSentencePieceModel(absl::string_view serialized,
                                                         absl::string_view tokenizer_config_json) {
  if (serialized.size() > kMaxModelBytes) {
    return absl::InvalidArgumentError(absl::StrCat("the sentencepiece model has ",
                                                   serialized.size(), " bytes, the limit is ",
                                                   kMaxModelBytes));
  }
  TokenizerSpec spec;
  if (!SentencePiece::Parse({serialized.data(), serialized.size()}, &spec.vocabulary)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the ", serialized.size(), " bytes are not a sentencepiece model"));
  }
  // Absent symbols keep the trainer's default ids, so an id counts only if a control token is
  // there.
  for (int* id : {&spec.vocabulary.bos, &spec.vocabulary.eos}) {
    if (*id < 0 || *id >= static_cast<int64_t>(spec.vocabulary.pieces.size()) ||
        spec.vocabulary.pieces[*id].type != PieceType::kControl) {
      *id = -1;
    }
  }
  spec.add_bos = spec.vocabulary.bos >= 0;
  absl::flat_hash_set<int> special;
  if (!tokenizer_config_json.empty()) {
    if (absl::Status s = ApplyConfig(tokenizer_config_json, &spec, &special); !s.ok()) return s;
  }
  Finish(special, &spec);
  if (absl::Status s = ValidateVocabulary(spec.vocabulary); !s.ok()) return s;
  return spec;
}

absl::StatusOr<TokenizerSpec> SpecFromGgufTokenizer(const GgufMetadata& metadata) {
  const auto model = Require<std::string>(metadata, "tokenizer.ggml.model");
  if (!model.ok()) return model.status();
  if (**model != "llama") {
    return absl::UnimplementedError(
        absl::StrCat("tokenizer.ggml.model ", Quote(**model), " is not supported; \"llama\" is"));
  }
  TokenizerSpec spec;
  Vocabulary& vocabulary = spec.vocabulary;
  vocabulary.algorithm = Vocabulary::Algorithm::kBpe;
  vocabulary.has_character_map =
      metadata.find(std::string("tokenizer.ggml.precompiled_charsmap")) != metadata.end();
  if (absl::Status s = ReadPieces(metadata, &vocabulary); !s.ok()) return s;

  int unknown = -1, end_of_turn = -1;
  for (const auto& [key, id] : {std::pair{"tokenizer.ggml.unknown_token_id", &unknown},
                                std::pair{"tokenizer.ggml.bos_token_id", &vocabulary.bos},
                                std::pair{"tokenizer.ggml.eos_token_id", &vocabulary.eos},
                                std::pair{"tokenizer.ggml.eot_token_id", &end_of_turn}}) {
    const absl::StatusOr<int> value = TokenId(metadata, key);
    if (!value.ok()) return value.status();
    if (absl::Status s = ValidateTokenId(key, *value, vocabulary.pieces.size()); !s.ok()) return s;
    *id = *value;
  }
  if (absl::Status s = SetUnknown(unknown, &vocabulary); !s.ok()) return s;
  if (end_of_turn >= 0) spec.eos.push_back(end_of_turn);

  // llama.cpp's defaults for this kind of vocabulary.
  spec.add_bos = true;
  vocabulary.add_dummy_prefix = true;
  for (const auto& [key, flag] :
       {std::pair{"tokenizer.ggml.add_bos_token", &spec.add_bos},
        std::pair{"tokenizer.ggml.add_space_prefix", &vocabulary.add_dummy_prefix},
        std::pair{"tokenizer.ggml.remove_extra_whitespaces",
                  &vocabulary.remove_extra_whitespaces}}) {
    if (absl::Status s = ReadFlag(metadata, key, flag); !s.ok()) return s;
  }
  const auto chat_template = Find<std::string>(metadata, "tokenizer.chat_template");
  if (!chat_template.ok()) return chat_template.status();
  if (*chat_template != nullptr) spec.chat_template = **chat_template;
  Finish({}, &spec);
  if (absl::Status s = ValidateVocabulary(vocabulary); !s.ok()) return s;
  return spec;
}

}  // namespace longspan
