#include "models/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <ctime>
#include <nlohmann/json.hpp>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "tests/support/golden.h"
#include "tests/support/paths.h"
#include "tests/support/tokenizer_case.h"
#include "tests/support/tokenizer_golden.h"

namespace longspan {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::kFirstPiece;
using testing::ReadFile;
using testing::ReadTokenizerGoldens;
using testing::SmallGguf;
using testing::SourcePath;

constexpr Tokenizer::EncodeOptions kPlain{.add_bos = false, .parse_special = false};
constexpr Tokenizer::EncodeOptions kSpecial{.add_bos = false, .parse_special = true};

std::string DefaultModel() { return ReadFile(SourcePath("models/default/tokenizer.model")); }
std::string DefaultConfig() { return ReadFile(SourcePath("models/default/tokenizer_config.json")); }

const Tokenizer& Default() {
  static const auto* tokenizer =
      Tokenizer::FromSentencePieceModel(DefaultModel(), DefaultConfig())->release();
  return *tokenizer;
}

std::unique_ptr<Tokenizer> FromGguf(const GgufMetadata& metadata) {
  auto tokenizer = Tokenizer::FromGguf(metadata);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

void ExpectRefused(const GgufMetadata& metadata, const std::string& why) {
  const auto tokenizer = Tokenizer::FromGguf(metadata);
  ASSERT_FALSE(tokenizer.ok()) << why;
  EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(why));
}

TEST(Tokenizer, GivesTheReferencesIdsForTheDefaultModel) {
  const auto cases = ReadTokenizerGoldens("default.json");
  ASSERT_GE(cases.size(), 300u);
  testing::ExpectTokenizerGoldens(Default(), cases);
}

TEST(Tokenizer, BringsBackEveryTextThatIsUtf8) {
  int tried = 0;
  for (const auto& golden : ReadTokenizerGoldens("default.json")) {
    const std::string replaced = Default().Decode(golden.plain, /*skip_special=*/false);
    // U+2581 is how pieces write a space, so it comes back as one.
    const std::string spaces = absl::StrReplaceAll(golden.text, {{"\u2581", " "}});
    if (absl::StrContains(replaced, "\uFFFD") && !absl::StrContains(golden.text, "\uFFFD"))
      continue;
    EXPECT_EQ(replaced, spaces);
    ++tried;
  }
  EXPECT_GE(tried, 300);
}

TEST(Tokenizer, BeginsWithTheDocumentTokenOfTheDefaultModel) {
  EXPECT_EQ(Default().bos(), Default().FindToken("<|doc|>"));
  EXPECT_TRUE(Default().add_bos_token());
  EXPECT_EQ(Default().Encode("a")[0], Default().bos());
  EXPECT_EQ(Default().Encode("").size(), 1u);
  EXPECT_EQ(Default().Encode("", kSpecial).size(), 0u);
  EXPECT_THAT(Default().eos(), ElementsAre(Default().bos(), Default().FindToken("<|end|>")));
  EXPECT_EQ(Default().vocab_size(), 8192);
  EXPECT_STREQ(Default().kind(), "sentencepiece-bpe");
  EXPECT_EQ(Default().chat_template(), "");
}

TEST(Tokenizer, TakesMarkersFromTextOnlyWhenToldTo) {
  const int doc = Default().FindToken("<|doc|>");
  EXPECT_THAT(Default().Encode("<|doc|>", kSpecial), ElementsAre(doc));
  EXPECT_THAT(Default().Encode("<|doc|>", kPlain), ::testing::Not(::testing::Contains(doc)));
  EXPECT_EQ(Default().Decode(Default().Encode("<|doc|>", kPlain), /*skip_special=*/true),
            "<|doc|>");
  EXPECT_TRUE(Default().IsSpecial(doc));
  EXPECT_EQ(Default().Decode({doc}, /*skip_special=*/true), "");
  EXPECT_EQ(Default().Decode({doc}, /*skip_special=*/false), "<|doc|>");
}

TEST(Tokenizer, FindsTheFirstMarkerInAText) {
  EXPECT_EQ(Default().FindSpecialText("nothing <|doc here"), std::nullopt);
  EXPECT_EQ(Default().FindSpecialText("ab</s><|doc|>"),
            std::pair(size_t{2}, static_cast<int32_t>(Default().FindToken("</s>"))));
}

TEST(Tokenizer, TakesTheLongestOfSeveralMarkersThatBeginTogether) {
  GgufMetadata metadata = SmallGguf({"a"});
  auto& tokens = std::get<std::vector<std::string>>(metadata["tokenizer.ggml.tokens"]);
  auto& types = std::get<std::vector<int64_t>>(metadata["tokenizer.ggml.token_type"]);
  auto& scores = std::get<std::vector<double>>(metadata["tokenizer.ggml.scores"]);
  for (const char* text : {"<x", "<xy>"}) {
    tokens.push_back(text);
    types.push_back(3);
    scores.push_back(0);
  }
  const auto tokenizer = FromGguf(metadata);
  EXPECT_THAT(tokenizer->Encode("<xy><x", kSpecial), ElementsAre(kFirstPiece + 2, kFirstPiece + 1));
}

TEST(Tokenizer, KeepsUserDefinedTextWholeInPlainText) {
  GgufMetadata metadata = SmallGguf({"a", "b", "ab"});
  auto& tokens = std::get<std::vector<std::string>>(metadata["tokenizer.ggml.tokens"]);
  for (const char* text : {"\n\n", "  "}) {
    tokens.push_back(text);
    std::get<std::vector<int64_t>>(metadata["tokenizer.ggml.token_type"]).push_back(4);
    std::get<std::vector<double>>(metadata["tokenizer.ggml.scores"]).push_back(0);
  }
  const auto tokenizer = FromGguf(metadata);
  EXPECT_THAT(tokenizer->Encode("ab\n\na", kPlain),
              ElementsAre(kFirstPiece + 2, kFirstPiece + 3, kFirstPiece));
  EXPECT_THAT(tokenizer->Encode("a  b", kPlain),
              ElementsAre(kFirstPiece, kFirstPiece + 4, kFirstPiece + 1));
  EXPECT_EQ(tokenizer->Piece(kFirstPiece + 4), "  ");
  EXPECT_FALSE(tokenizer->IsSpecial(kFirstPiece + 3));
}

TEST(Tokenizer, FallsBackToBytes) {
  const auto tokenizer = FromGguf(SmallGguf({"a"}));
  // U+20AC is E2 82 AC; byte b is token 3 + b.
  EXPECT_THAT(tokenizer->Encode("\u20ACa", kPlain),
              ElementsAre(3 + 0xE2, 3 + 0x82, 3 + 0xAC, kFirstPiece));
  EXPECT_EQ(tokenizer->Piece(3 + 0x82), "\x82");
  EXPECT_EQ(tokenizer->Decode({3 + 0xE2, 3 + 0x82, 3 + 0xAC, kFirstPiece}, true), "\u20ACa");
}

TEST(Tokenizer, WritesEachByteOfBrokenUtf8AsAReplacementCharacter) {
  const auto tokenizer = FromGguf(SmallGguf({"a"}));
  const auto decode = [&](std::vector<int> bytes) {
    std::vector<int32_t> ids;
    for (const int byte : bytes) ids.push_back(3 + byte);
    ids.push_back(kFirstPiece);
    return tokenizer->Decode(ids, /*skip_special=*/true);
  };
  EXPECT_EQ(decode({0xE2, 0x82}), "\uFFFD\uFFFDa");              // cut
  EXPECT_EQ(decode({0xFF}), "\uFFFDa");                          // never a byte of UTF-8
  EXPECT_EQ(decode({0xC0, 0x80}), "\uFFFD\uFFFDa");              // overlong
  EXPECT_EQ(decode({0xED, 0xA0, 0x80}), "\uFFFD\uFFFD\uFFFDa");  // surrogate
  EXPECT_EQ(decode({0xF4, 0x90, 0x80, 0x80}), "\uFFFD\uFFFD\uFFFD\uFFFDa");  // beyond U+10FFFF
  EXPECT_EQ(decode({0xE2, 0xE2, 0x82, 0xAC}), "\uFFFD\u20ACa");  // a cut one before a whole one
}

TEST(Tokenizer, LeavesTheDummyPrefixOutOfTheText) {
  GgufMetadata metadata = SmallGguf({"\u2581", "a", "\u2581a"});
  metadata["tokenizer.ggml.add_space_prefix"] = true;
  const auto tokenizer = FromGguf(metadata);
  EXPECT_THAT(tokenizer->Encode("a a", kPlain), ElementsAre(kFirstPiece + 2, kFirstPiece + 2));
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode("a a", kPlain), true), "a a");
  EXPECT_EQ(tokenizer->Decode(tokenizer->Encode(" a", kPlain), true), " a");
  EXPECT_EQ(tokenizer->Decode({1, kFirstPiece + 2}, /*skip_special=*/true), "a");
}

TEST(Tokenizer, HasNoTextForIdsOutsideTheVocabulary) {
  const int n = Default().vocab_size();
  EXPECT_EQ(Default().Piece(-1), "");
  EXPECT_EQ(Default().Piece(n), "");
  EXPECT_FALSE(Default().IsSpecial(n));
  EXPECT_EQ(Default().Decode({n, -5, 1 << 30}, false), "");
}

TEST(Tokenizer, EncodesAMebibyteOfOneCharacterInLinearTime) {
  for (const std::string unit : {"a", " ", "\u00E9", "\U0001F642", "<", "\n", "\xFF", "<|doc|>"}) {
    std::string text;
    while (text.size() < (size_t{1} << 20)) text += unit;
    const std::clock_t start = std::clock();
    const auto ids = Default().Encode(text);
    const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    EXPECT_GE(ids.size() * 7, text.size() / unit.size()) << unit;
    EXPECT_LT(seconds, 20) << unit;  // a quadratic encoder takes hours; 0.5 s alone on one core
  }
}

TEST(TokenStream, ConcatenatesToTheWholeTextAndIsAlwaysUtf8) {
  std::mt19937 random(7);
  const auto tokenizer = FromGguf(SmallGguf({"a", "\u20AC", "\u2581b", "\U0001F642"}));
  for (const Tokenizer* each : std::vector<const Tokenizer*>{tokenizer.get(), &Default()}) {
    const int bytes_begin = each == &Default() ? 7 : 3;
    for (int trial = 0; trial < 500; ++trial) {
      std::vector<int32_t> ids;
      for (int i = 0; i < 30; ++i) {
        const bool byte = random() % 3 != 0;  // mostly bytes, mostly broken
        ids.push_back(byte ? bytes_begin + 0x80 + random() % 0x80 : random() % each->vocab_size());
      }
      for (const bool skip_special : {false, true}) {
        TokenStream stream(*each, skip_special);
        std::string text;
        for (size_t i = 0; i <= ids.size(); ++i) {
          const std::string part = i < ids.size() ? stream.Append(ids[i]) : stream.Flush();
          EXPECT_NO_THROW(nlohmann::json(part).dump());  // throws unless UTF-8
          text += part;
        }
        EXPECT_EQ(text, each->Decode(ids, skip_special));
      }
    }
  }
}

TEST(TokenStream, HoldsBackAnUnfinishedCharacter) {
  const auto tokenizer = FromGguf(SmallGguf({"a"}));
  TokenStream stream(*tokenizer, /*skip_special=*/true);
  EXPECT_EQ(stream.Append(3 + 0xF0), "");
  EXPECT_EQ(stream.Append(3 + 0x9F), "");
  EXPECT_EQ(stream.Append(3 + 0x99), "");
  EXPECT_EQ(stream.Append(3 + 0x82), "\U0001F642");
  EXPECT_EQ(stream.Append(3 + 0xE2), "");
  EXPECT_EQ(stream.Append(kFirstPiece), "\uFFFDa");
  EXPECT_EQ(stream.Append(3 + 0xC3), "");
  EXPECT_EQ(stream.Flush(), "\uFFFD");
  EXPECT_EQ(stream.Flush(), "");
}

// --- hostile vocabularies ---

TEST(HostileGgufVocabulary, RefusesWhatIsMissingOrHasTheWrongType) {
  for (const char* key : {"tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.scores",
                          "tokenizer.ggml.token_type"}) {
    GgufMetadata metadata = SmallGguf({"a"});
    metadata[key] = uint64_t{7};
    ExpectRefused(metadata, absl::StrCat(key, " is not "));
    metadata.erase(key);
    ExpectRefused(metadata, absl::StrCat(key, " is missing"));
  }
  for (const char* key :
       {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template"}) {
    GgufMetadata metadata = SmallGguf({"a"});
    metadata[key] = std::vector<bool>{true};
    ExpectRefused(metadata, absl::StrCat(key, " is not "));
  }
}

TEST(HostileGgufVocabulary, RefusesOtherTokenizersByName) {
  GgufMetadata metadata = SmallGguf({"a"});
  metadata["tokenizer.ggml.model"] = std::string("gpt2");
  ExpectRefused(metadata, "\"gpt2\" is not supported");
}

TEST(HostileGgufVocabulary, RefusesArraysOfDifferentSizes) {
  GgufMetadata metadata = SmallGguf({"a"});
  std::get<std::vector<double>>(metadata["tokenizer.ggml.scores"]).pop_back();
  ExpectRefused(metadata, "tokens has 260 entries, scores 259, token_type 260");
}

TEST(HostileGgufVocabulary, RefusesIdsOutOfRange) {
  for (const char* key : {"tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
                          "tokenizer.ggml.eot_token_id", "tokenizer.ggml.unknown_token_id"}) {
    GgufMetadata metadata = SmallGguf({"a"});
    metadata[key] = uint64_t{260};
    ExpectRefused(metadata, absl::StrCat(key, " is 260, the vocabulary has 260 tokens"));
    metadata[key] = uint64_t{1} << 40;
    ExpectRefused(metadata, key);
    metadata[key] = int64_t{-2};
    ExpectRefused(metadata, key);
  }
}

struct BadPiece {
  std::string text;
  double score;
  int64_t type;
  std::string why;
};

class HostilePiece : public ::testing::TestWithParam<BadPiece> {};

TEST_P(HostilePiece, IsRefusedWithItsId) {
  const BadPiece& bad = GetParam();
  GgufMetadata metadata = SmallGguf({"a"});
  std::get<std::vector<std::string>>(metadata["tokenizer.ggml.tokens"]).push_back(bad.text);
  std::get<std::vector<double>>(metadata["tokenizer.ggml.scores"]).push_back(bad.score);
  std::get<std::vector<int64_t>>(metadata["tokenizer.ggml.token_type"]).push_back(bad.type);
  ExpectRefused(metadata, bad.why);
}

INSTANTIATE_TEST_SUITE_P(
    Each, HostilePiece,
    ::testing::Values(BadPiece{"", 0, 1, "token 260 \"\": is empty"},
                      BadPiece{"a", 0, 1, "token 260 \"a\": is also token 259"},
                      BadPiece{"b", NAN, 1, "is not a finite number"},
                      BadPiece{"b", INFINITY, 1, "is not a finite number"},
                      BadPiece{"b", 1e300, 1, "is not a finite number"},
                      BadPiece{"b", 0, 0, "token_type[260] is 0, not one of 1 to 6"},
                      BadPiece{"b", 0, 7, "token_type[260] is 7, not one of 1 to 6"},
                      BadPiece{"b", 0, -1, "token_type[260] is -1, not one of 1 to 6"},
                      BadPiece{"b", 0, 2, "must be longer than one character"},
                      BadPiece{"bb", 0, 2, "has 2 unknown tokens, it must have 1"},
                      BadPiece{"b", 0, 3, "must be longer than one character"},
                      BadPiece{"bb", 0, 6, "must read <0x00> to <0xFF>"},
                      BadPiece{"<0x4a>", 0, 6, "must read <0x00> to <0xFF>"},
                      BadPiece{"<0x41>", 0, 6, "is also token 68"},
                      BadPiece{"b\xFF", 0, 1, "is not UTF-8"},
                      BadPiece{std::string("b\0c", 3), 0, 4, "holds a NUL byte"},
                      BadPiece{std::string(1025, 'b'), 0, 1, "has 1025 bytes, the limit is 1024"}));

TEST(HostileGgufVocabulary, RefusesAVocabularyWithoutUnknownToken) {
  GgufMetadata metadata = SmallGguf({"a"});
  std::get<std::vector<int64_t>>(metadata["tokenizer.ggml.token_type"])[0] = 3;
  metadata.erase("tokenizer.ggml.unknown_token_id");
  ExpectRefused(metadata, "has 0 unknown tokens, it must have 1");
}

TEST(HostileGgufVocabulary, RefusesMissingBytes) {
  GgufMetadata metadata = SmallGguf({"a"});
  std::get<std::vector<int64_t>>(metadata["tokenizer.ggml.token_type"])[100] = 1;
  ExpectRefused(metadata, "has 255 byte tokens, it must have 256");
}

TEST(HostileGgufVocabulary, RefusesNestedUserDefinedTokensBeyondTheLibrarysTable) {
  for (const int n : {64, 65}) {
    GgufMetadata metadata = SmallGguf({"a"});
    for (int i = 1; i <= n; ++i) {
      std::get<std::vector<std::string>>(metadata["tokenizer.ggml.tokens"])
          .push_back(std::string(i, '\t'));
      std::get<std::vector<double>>(metadata["tokenizer.ggml.scores"]).push_back(0);
      std::get<std::vector<int64_t>>(metadata["tokenizer.ggml.token_type"]).push_back(4);
    }
    if (n == 65) {
      ExpectRefused(metadata, "begins with 64 others, the limit is 63");
    } else {
      EXPECT_THAT(FromGguf(metadata)->Encode(std::string(64, '\t'), kPlain),
                  ElementsAre(kFirstPiece + 64));
    }
  }
}

TEST(HostileSentencePieceModel, RefusesBytesThatAreNone) {
  for (const std::string& bytes : {std::string("hello"), std::string(100, '\xFF'), std::string(),
                                   DefaultModel().substr(0, 100000)}) {
    EXPECT_FALSE(Tokenizer::FromSentencePieceModel(bytes, "").ok());
  }
}

TEST(TokenizerConfig, RefusesWhatItDoesNotUnderstand) {
  for (const auto& [config, why] : std::vector<std::pair<std::string, std::string>>{
           {"[]", "object"},
           {"{", "tokenizer_config.json"},
           {R"({"bos_token": 7})", "bos_token is a number, not a token"},
           {R"({"bos_token": "nowhere"})", "bos_token \"nowhere\" is not in the vocabulary"},
           {R"({"add_bos_token": "yes"})", "add_bos_token is a string, not a boolean"},
           {R"({"chat_template": 1})", "chat_template is a number"},
           {R"({"added_tokens_decoder": {"x": {}}})", "not a token id"},
           {R"({"added_tokens_decoder": {"5": {}}})", "has no \"content\" string"},
           {R"({"added_tokens_decoder": {"300": {"content": "<s>"}}})", "is also token"},
           {std::string(100000, '['), "tokenizer_config.json"}}) {
    const auto tokenizer = Tokenizer::FromSentencePieceModel(DefaultModel(), config);
    ASSERT_FALSE(tokenizer.ok()) << config.substr(0, 80);
    EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(why));
  }
}

TEST(TokenizerConfig, NamesTheSpecialTokens) {
  const auto tokenizer = Tokenizer::FromSentencePieceModel(DefaultModel(), R"({
      "bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": false,
      "chat_template": "hi",
      "added_tokens_decoder": {"300": {"content": "[turn]", "special": true},
                               "301": {"content": "[text]", "special": false},
                               "9999": {"content": "[beyond]", "special": true}}})");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos(), 1);
  EXPECT_FALSE((*tokenizer)->add_bos_token());
  EXPECT_EQ((*tokenizer)->chat_template(), "hi");
  EXPECT_THAT((*tokenizer)->Encode("[turn]"), ElementsAre(300));
  EXPECT_TRUE((*tokenizer)->IsSpecial(300));
  EXPECT_THAT((*tokenizer)->Encode("[text]", kPlain), ElementsAre(301));
  EXPECT_FALSE((*tokenizer)->IsSpecial(301));
  EXPECT_EQ((*tokenizer)->FindToken("[beyond]"), -1);
  EXPECT_EQ((*tokenizer)->vocab_size(), 8192);
}

}  // namespace
}  // namespace longspan
