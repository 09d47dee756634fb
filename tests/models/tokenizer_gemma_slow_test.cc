// The tokenizer of Gemma 3 270M's GGUF: 262,144 tokens, user-defined runs of spaces and newlines.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/check.h"
#include "models/checkpoint.h"
#include "models/tokenizer.h"
#include "tests/support/gemma_file.h"
#include "tests/support/tokenizer_golden.h"

namespace longspan {
namespace {

const Tokenizer& Gemma() {
  static const auto* tokenizer = [] {
    const auto checkpoint = Checkpoint::Open(testing::GemmaFile());
    CHECK(checkpoint.ok()) << checkpoint.status();
    auto created = Tokenizer::Create(**checkpoint);
    CHECK(created.ok()) << created.status();
    return created->release();
  }();
  return *tokenizer;
}

TEST(GemmaTokenizer, GivesTheReferencesIds) {
  const auto cases = testing::ReadTokenizerGoldens("gemma.json");
  ASSERT_GE(cases.size(), 300u);
  testing::ExpectTokenizerGoldens(Gemma(), cases);
}

TEST(GemmaTokenizer, KnowsItsSpecialTokens) {
  EXPECT_EQ(Gemma().vocab_size(), 262144);
  EXPECT_EQ(Gemma().bos(), 2);
  EXPECT_TRUE(Gemma().add_bos_token());
  EXPECT_THAT(Gemma().eos(), ::testing::ElementsAre(1, 106));  // <eos>, <end_of_turn>
  EXPECT_EQ(Gemma().FindToken("<start_of_turn>"), 105);
  EXPECT_TRUE(Gemma().IsSpecial(105));
  EXPECT_FALSE(Gemma().IsSpecial(108));  // "\n\n"
  EXPECT_EQ(Gemma().Decode({105, 2364, 107, 106}, /*skip_special=*/true), "user\n");
}

}  // namespace
}  // namespace longspan
