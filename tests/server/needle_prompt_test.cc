#include "server/needle_prompt.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "models/checkpoint.h"
#include "tests/support/paths.h"

namespace longspan {
namespace {

using testing::SourcePath;

class NeedlePrompts : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto checkpoint = Checkpoint::Open(SourcePath("models/default"));
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    auto made = Tokenizer::Create(**checkpoint);
    ASSERT_TRUE(made.ok()) << made.status();
    tokenizer_ = std::move(*made).release();
  }
  static std::string Essay() {
    std::ifstream in(SourcePath("models/haystack/essay.txt"));
    return std::string(std::istreambuf_iterator<char>(in), {});
  }
  static std::unique_ptr<NeedlePrompter> Make(Haystack haystack, const std::string& prose) {
    auto made = NeedlePrompter::Create(*tokenizer_, haystack, prose);
    EXPECT_TRUE(made.ok()) << made.status();
    return *std::move(made);
  }
  static std::string Text(const NeedlePrompt& prompt) {
    return tokenizer_->Decode(prompt.tokens, /*skip_special=*/true);
  }
  static std::string Text(const NeedlePrompt& prompt, ProbeRange range) {
    return tokenizer_->Decode(
        absl::MakeConstSpan(prompt.tokens).subspan(range.begin, range.end - range.begin), true);
  }

  static Tokenizer* tokenizer_;
};
Tokenizer* NeedlePrompts::tokenizer_ = nullptr;

TEST_F(NeedlePrompts, HaveTheExactLengthAndPointAtTheirValues) {
  const std::string essay = Essay();
  ASSERT_GT(essay.size(), 200'000u);
  for (const Haystack haystack : {Haystack::kEssay, Haystack::kNoise, Haystack::kNeedles}) {
    const auto prompter = Make(haystack, essay);
    for (const auto& [keys, all, values] : {std::tuple{1, false, 1}, std::tuple{4, false, 1},
                                            std::tuple{1, false, 4}, std::tuple{4, true, 1}}) {
      for (const int length : {400, 512, 777, 1024, 4096}) {
        for (const double depth : {0.0, 12.5, 50.0, 99.0, 100.0}) {
          const NeedleSpec spec = {.keys = keys,
                                   .asks_all_keys = all,
                                   .values = values,
                                   .context_length = length,
                                   .depth_percent = depth,
                                   .seed = 5};
          const auto prompt = prompter->Build(spec);
          ASSERT_TRUE(prompt.ok()) << prompt.status();
          EXPECT_EQ(static_cast<int>(prompt->tokens.size()) + prompt->max_tokens, length);
          ASSERT_EQ(prompt->values.size(), prompt->expected.size());
          ASSERT_EQ(prompt->expected.size(), static_cast<size_t>(values * (all ? keys : 1)));
          for (size_t i = 0; i < prompt->values.size(); ++i) {
            EXPECT_EQ(absl::StripAsciiWhitespace(Text(*prompt, prompt->values[i])),
                      prompt->expected[i]);
          }
        }
      }
    }
  }
}

TEST_F(NeedlePrompts, UseRulersWordsForOneValue) {
  const auto prompt = Make(Haystack::kEssay, Essay())
                          ->Build({.context_length = 600, .depth_percent = 40, .seed = 1});
  ASSERT_TRUE(prompt.ok());
  const std::string text = Text(*prompt);
  EXPECT_TRUE(absl::StartsWith(text,
                               "A special magic number is hidden within the following text. Make "
                               "sure to memorize it. I will "
                               "quiz you about the number afterwards.\n"))
      << text;
  const size_t at = text.find("\nWhat is the special magic number for ");
  ASSERT_NE(at, std::string::npos) << text;
  const size_t begin = at + std::string("\nWhat is the special magic number for ").size();
  const std::string key = text.substr(begin, text.find(' ', begin) - begin);
  EXPECT_EQ(absl::StripTrailingAsciiWhitespace(text.substr(at)),
            absl::StrCat("\nWhat is the special magic number for ", key,
                         " mentioned in the provided text? The special magic number for ", key,
                         " mentioned in the provided text is"));
  EXPECT_NE(text.find(absl::StrCat("One of the special magic numbers for ", key,
                                   " is: ", prompt->expected[0], ".")),
            std::string::npos);
}

TEST_F(NeedlePrompts, UseRulersWordsForSeveralValues) {
  const auto prompt =
      Make(Haystack::kNoise, "")
          ->Build({.keys = 3, .asks_all_keys = true, .context_length = 700, .seed = 1});
  ASSERT_TRUE(prompt.ok());
  const std::string text = Text(*prompt);
  EXPECT_TRUE(absl::StartsWith(text,
                               "Some special magic numbers are hidden within the following "
                               "text. Make sure to memorize it. I will quiz you about the "
                               "numbers afterwards.\n"))
      << text;
  EXPECT_NE(text.find("\nWhat are all the special magic numbers for "), std::string::npos);
  EXPECT_NE(text.find(", and "), std::string::npos);
  EXPECT_NE(text.find("The grass is green. The sky is blue. The sun is yellow. Here we go. There "
                      "and back again."),
            std::string::npos);
  EXPECT_TRUE(absl::EndsWith(absl::StripTrailingAsciiWhitespace(text),
                             " mentioned in the provided text are"));
}

TEST_F(NeedlePrompts, DependOnSeedLengthDepthAndTrialAlone) {
  const std::string essay = Essay();
  const auto one = Make(Haystack::kEssay, essay), other = Make(Haystack::kEssay, essay);
  const NeedleSpec base = {.context_length = 512, .depth_percent = 50, .seed = 3, .trial = 1};
  std::set<std::vector<int32_t>> different;
  for (int change = 0; change < 5; ++change) {
    NeedleSpec spec = base;
    if (change == 1) spec.seed = 4;
    if (change == 2) spec.trial = 2;
    if (change == 3) spec.depth_percent = 60;
    if (change == 4) spec.context_length = 513;
    const auto a = one->Build(spec), b = other->Build(spec);
    ASSERT_TRUE(a.ok() && b.ok());
    EXPECT_EQ(a->tokens, b->tokens);
    different.insert(a->tokens);
  }
  EXPECT_EQ(different.size(), 5u);
}

TEST_F(NeedlePrompts, PlaceTheNeedleNearItsDepth) {
  const auto prompter = Make(Haystack::kEssay, Essay());
  for (const double depth : {0.0, 25.0, 50.0, 75.0, 100.0}) {
    const auto prompt =
        prompter->Build({.context_length = 8192, .depth_percent = depth, .seed = 9});
    ASSERT_TRUE(prompt.ok());
    // Within a long sentence (256 tokens) and the question of the exact place.
    EXPECT_NEAR(prompt->values[0].begin, depth / 100 * 8192, 340) << depth;
  }
}

TEST_F(NeedlePrompts, PutTheNeedleBetweenSentences) {
  const auto prompter = Make(Haystack::kEssay, Essay());
  for (int depth = 5; depth < 100; depth += 5) {
    const auto prompt = prompter->Build(
        {.context_length = 2048, .depth_percent = static_cast<double>(depth), .seed = 2});
    ASSERT_TRUE(prompt.ok());
    const std::string text = Text(*prompt);
    const size_t at = text.find(" One of the special magic numbers for ");
    ASSERT_NE(at, std::string::npos);
    EXPECT_NE(std::string(".!?\"')").find(text[at - 1]), std::string::npos)
        << text.substr(at - 60, 120);
  }
}

TEST_F(NeedlePrompts, RefuseAContextThatIsTooShort) {
  const auto prompt = Make(Haystack::kNoise, "")->Build({.context_length = 40});
  ASSERT_FALSE(prompt.ok());
  EXPECT_EQ(prompt.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(prompt.status().message().find("40"), std::string::npos) << prompt.status();
}

TEST_F(NeedlePrompts, TakeTextOfAnyKind) {
  for (const std::string& text :
       {std::string("one two three"), std::string("ohne Punkt und Komma ohne Ende 森の中"),
        std::string(5000, 'x'), std::string("<|doc|> is not a token here.")}) {
    const auto prompt = Make(Haystack::kEssay, text)->Build({.context_length = 600});
    ASSERT_TRUE(prompt.ok()) << prompt.status();
    EXPECT_EQ(static_cast<int>(prompt->tokens.size()) + prompt->max_tokens, 600);
    // Only the beginning of the prompt may be a control token.
    for (size_t i = 1; i < prompt->tokens.size(); ++i) {
      EXPECT_FALSE(tokenizer_->IsSpecial(prompt->tokens[i])) << i;
    }
  }
  EXPECT_FALSE(NeedlePrompter::Create(*tokenizer_, Haystack::kEssay, " \n\t ").ok());
}

TEST(SplitSentences, KeepsAbbreviationsAndInitialsTogether) {
  EXPECT_EQ(SplitSentences("Mr. Blake  came.\n\"Sit down!\" said J. Smith. Why? he asked. Yes."),
            (std::vector<std::string>{"Mr. Blake came.", "\"Sit down!\" said J. Smith.",
                                      "Why? he asked.", "Yes."}));
  EXPECT_TRUE(SplitSentences(" \n ").empty());
}

TEST(ScoreAnswer, IsTheShareOfValuesContainedIgnoringCase) {
  const std::vector<std::string> expected = {"1234567", "AbC"};
  EXPECT_EQ(ScoreAnswer(" 1234567 and ABC.", expected), 1);
  EXPECT_EQ(ScoreAnswer("xx1234567xx", expected), 0.5);
  EXPECT_EQ(ScoreAnswer("123456 7", expected), 0);
  EXPECT_EQ(ScoreAnswer("", expected), 0);
}

}  // namespace
}  // namespace longspan
