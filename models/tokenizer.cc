#include "models/tokenizer.h"

#include <algorithm>
#include <set>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "models/sentencepiece_bridge.h"
#include "models/tokenizer_vocabulary.h"
#include "models/utf8.h"

namespace longspan {
namespace {

constexpr absl::string_view kSpaceSymbol = "\xE2\x96\x81";  // U+2581 stands for a space in pieces
constexpr absl::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

std::string_view Std(absl::string_view text) { return {text.data(), text.size()}; }

// absl::StrReplaceAll allocates a list of what it replaces; this is called for every token.
std::string WithSpaces(std::string_view piece) {
  std::string text;
  for (size_t at; (at = piece.find(Std(kSpaceSymbol))) != std::string_view::npos;) {
    text.append(piece.substr(0, at)).push_back(' ');
    piece.remove_prefix(at + kSpaceSymbol.size());
  }
  return text.append(piece);
}

// Moves the well-formed characters of `bytes` to `out`, each stray byte as U+FFFD. Leaves what
// further bytes may still complete, unless `final`.
void MoveText(bool final, std::string* bytes, std::string* out) {
  std::string_view rest = *bytes;
  while (!rest.empty()) {
    if (const size_t length = Utf8Length(rest); length > 0) {
      out->append(rest.substr(0, length));
      rest.remove_prefix(length);
    } else if (!final && Utf8Unfinished(rest)) {
      break;
    } else {
      absl::StrAppend(out, kReplacement);
      rest.remove_prefix(1);
    }
  }
  bytes->erase(0, bytes->size() - rest.size());
}

// Finds the texts of control tokens, the longest first where several begin.
class MarkerMatcher {
 public:
  void Add(std::string text, int32_t id) {
    lengths_[static_cast<unsigned char>(text[0])].insert(text.size());
    ids_.emplace(std::move(text), id);
  }

  struct Match {
    size_t begin, length;
    int32_t id;
  };
  // The first at or after `from`; length 0 when there is none.
  Match Find(absl::string_view text, size_t from) const {
    for (size_t i = from; i < text.size(); ++i) {
      for (const size_t length : lengths_[static_cast<unsigned char>(text[i])]) {
        if (length > text.size() - i) continue;
        const auto it = ids_.find(text.substr(i, length));
        if (it != ids_.end()) return {i, length, it->second};
      }
    }
    return {text.size(), 0, -1};
  }

 private:
  absl::flat_hash_map<std::string, int32_t> ids_;
  std::set<size_t, std::greater<>> lengths_[256];  // by first byte
};

}  // namespace

struct Tokenizer::Impl {
  TokenizerSpec spec;
  std::unique_ptr<SentencePiece> pieces;
  MarkerMatcher markers;
};

Tokenizer::Tokenizer() : impl_(std::make_unique<Impl>()) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromSpec(TokenizerSpec spec) {
  std::unique_ptr<Tokenizer> tokenizer(new Tokenizer());
  Impl& impl = *tokenizer->impl_;
  std::string error;
  impl.pieces = SentencePiece::Create(spec.vocabulary, &error);
  if (impl.pieces == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("sentencepiece refuses the vocabulary: ", error));
  }
  impl.spec = std::move(spec);
  const auto& pieces = impl.spec.vocabulary.pieces;
  for (size_t i = 0; i < pieces.size(); ++i) {
    if (impl.spec.marker[i] || pieces[i].type == PieceType::kUnknown) {
      impl.markers.Add(pieces[i].text, static_cast<int32_t>(i));
    }
  }
  return tokenizer;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromSentencePieceModel(
    absl::string_view serialized, absl::string_view tokenizer_config_json) {
  absl::StatusOr<TokenizerSpec> spec =
      SpecFromSentencePieceModel(serialized, tokenizer_config_json);
  if (!spec.ok()) return spec.status();
  return FromSpec(*std::move(spec));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromGguf(const GgufMetadata& metadata) {
  absl::StatusOr<TokenizerSpec> spec = SpecFromGgufTokenizer(metadata);
  if (!spec.ok()) return spec.status();
  return FromSpec(*std::move(spec));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Create(const Checkpoint& checkpoint) {
  const auto in_file = [&](const absl::Status& status) {
    return absl::Status(status.code(), absl::StrCat(checkpoint.path(), ": ", status.message()));
  };
  if (checkpoint.format() == Checkpoint::Format::kGguf) {
    auto tokenizer = FromGguf(checkpoint.gguf());
    if (!tokenizer.ok()) return in_file(tokenizer.status());
    return tokenizer;
  }
  const auto model = checkpoint.ReadSideFile("tokenizer.model");
  if (!model.ok()) return model.status();
  if (model->empty()) {
    return absl::NotFoundError(absl::StrCat(checkpoint.path(),
                                            ": has no tokenizer.model; other tokenizers than "
                                            "sentencepiece (tokenizer.json) are not supported"));
  }
  const auto config = checkpoint.ReadSideFile("tokenizer_config.json");
  if (!config.ok()) return config.status();
  auto tokenizer = FromSentencePieceModel(*model, *config);
  if (!tokenizer.ok()) return in_file(tokenizer.status());
  const auto chat_template = checkpoint.ReadSideFile("chat_template.jinja");
  if (!chat_template.ok()) return chat_template.status();
  if (!chat_template->empty()) (*tokenizer)->impl_->spec.chat_template = *chat_template;
  return tokenizer;
}

std::vector<int32_t> Tokenizer::Encode(absl::string_view text, EncodeOptions options) const {
  std::vector<int32_t> ids;
  if (options.add_bos && add_bos_token()) ids.push_back(bos());
  if (!options.parse_special) {
    impl_->pieces->Encode(Std(text), &ids);
    return ids;
  }
  for (size_t at = 0; at < text.size();) {
    const MarkerMatcher::Match match = impl_->markers.Find(text, at);
    if (match.begin > at) impl_->pieces->Encode(Std(text.substr(at, match.begin - at)), &ids);
    if (match.length > 0) ids.push_back(match.id);
    at = match.begin + match.length;
  }
  return ids;
}

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, bool skip_special) const {
  TokenStream stream(*this, skip_special);
  std::string text;
  for (const int32_t id : ids) text += stream.Append(id);
  return text + stream.Flush();
}

std::string Tokenizer::Piece(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return "";
  const Vocabulary& vocabulary = impl_->spec.vocabulary;
  const VocabularyPiece& piece = vocabulary.pieces[id];
  if (piece.type == PieceType::kUnknown) return vocabulary.unknown_surface;
  if (piece.type == PieceType::kByte) {
    return std::string(1, static_cast<char>(std::stoi(piece.text.substr(3, 2), nullptr, 16)));
  }
  return WithSpaces(piece.text);
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && impl_->spec.marker[id];
}

int Tokenizer::vocab_size() const { return static_cast<int>(impl_->spec.vocabulary.pieces.size()); }
int Tokenizer::bos() const { return impl_->spec.vocabulary.bos; }
std::vector<int> Tokenizer::eos() const { return impl_->spec.eos; }
bool Tokenizer::add_bos_token() const { return impl_->spec.add_bos && bos() >= 0; }
const std::string& Tokenizer::chat_template() const { return impl_->spec.chat_template; }

int Tokenizer::FindToken(absl::string_view piece) const { return impl_->pieces->Find(Std(piece)); }

std::optional<std::pair<size_t, int32_t>> Tokenizer::FindSpecialText(absl::string_view text) const {
  const MarkerMatcher::Match match = impl_->markers.Find(text, 0);
  if (match.length == 0) return std::nullopt;
  return std::pair(match.begin, match.id);
}

const char* Tokenizer::kind() const {
  return impl_->spec.vocabulary.algorithm == Vocabulary::Algorithm::kBpe ? "sentencepiece-bpe"
                                                                         : "sentencepiece-unigram";
}

TokenStream::TokenStream(const Tokenizer& tokenizer, bool skip_special)
    : tokenizer_(&tokenizer), skip_special_(skip_special) {}

std::string TokenStream::Append(int32_t id) {
  if (skip_special_ && tokenizer_->IsSpecial(id)) return "";
  std::string piece = tokenizer_->Piece(id);
  // The space that the encoder put before the text is not a part of it.
  const Vocabulary& vocabulary = tokenizer_->impl_->spec.vocabulary;
  if (at_start_ && (vocabulary.add_dummy_prefix || vocabulary.remove_extra_whitespaces) &&
      id >= 0 && id < tokenizer_->vocab_size() &&
      absl::StartsWith(vocabulary.pieces[id].text, kSpaceSymbol)) {
    piece.erase(0, 1);
    at_start_ = vocabulary.remove_extra_whitespaces && piece.empty();
  } else if (!piece.empty()) {
    at_start_ = false;
  }
  held_ += piece;
  std::string text;
  MoveText(/*final=*/false, &held_, &text);
  return text;
}

std::string TokenStream::Flush() {
  std::string text;
  MoveText(/*final=*/true, &held_, &text);
  return text;
}

}  // namespace longspan
