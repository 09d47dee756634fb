#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "models/family.h"
#include "tests/support/full_op_table.h"
#include "tests/support/paths.h"

namespace longspan {
namespace {

using ::testing::ContainsRegex;
using ::testing::EndsWith;
using testing::FullOpTable;
using ::testing::HasSubstr;
using ::testing::Not;

ModelSpec DefaultModel() {
  auto spec = ReadSpecAt(testing::SourcePath("models/default"));
  EXPECT_TRUE(spec.ok()) << spec.status();
  return *std::move(spec);
}

TEST(Describe, HasALineForEachLayer) {
  const std::string text = Describe(DefaultModel(), FullOpTable(), DType::kBF16, 4096);
  EXPECT_THAT(text, HasSubstr("swa_hybrid"));
  EXPECT_THAT(text, HasSubstr("18,145,152 parameters"));
  // k and v of 2 heads of 64 in two bytes: 512 per token; 64 tokens of it: 32,768.
  EXPECT_THAT(text,
              ContainsRegex("\n    0 [|] window 64, 6/2 heads of 64 +[|] rope 10000 [|] ring +"
                            "[|] 512 per token, at most 32,768 per sequence\n"));
  EXPECT_THAT(text, ContainsRegex("\n    9 [|] full, 6/2 heads of 64 +[|] none +[|] pages +"
                                  "[|] 512 per token\n"));
  EXPECT_THAT(text, EndsWith("missing: nothing\n"));
}

TEST(Describe, GivesTheClosedFormExactly) {
  // 5 full layers of 4,096 tokens and 5 window layers of 64, 512 bytes each.
  EXPECT_THAT(
      Describe(DefaultModel(), FullOpTable(), DType::kBF16, 4096),
      HasSubstr("5 x 4,096 x 512 + 5 x min(4,096, 64) x 512 = 10,649,600 bytes (10.2 MiB)"));
  // Shorter than the window: 10 layers of 10 tokens.
  EXPECT_THAT(Describe(DefaultModel(), FullOpTable(), DType::kBF16, 10),
              HasSubstr("= 51,200 bytes (50.0 KiB)"));
  EXPECT_THAT(Describe(DefaultModel(), FullOpTable(), DType::kF32, 4096),
              HasSubstr("= 21,299,200 bytes (20.3 MiB)"));
  // Of 64 numbers two blocks of 34 bytes.
  EXPECT_THAT(Describe(DefaultModel(), FullOpTable(), DType::kQ8_0, 4096),
              HasSubstr("(Q8_0): 5 x 4,096 x 272 + 5 x min(4,096, 64) x 272 = 5,657,600 bytes"));
}

TEST(Describe, ShowsStatesSharedCachesAndWhatIsMissing) {
  ModelSpec spec = DefaultModel();
  spec.layers[0].mixer = RecurrentSpec{"mamba2", 4096};
  spec.layers[3].cache_of = 1;
  const std::string text = Describe(spec, FullOpTable(), DType::kBF16, 100);
  EXPECT_THAT(text, ContainsRegex("\n    0 [|] mamba2 .*[|] state +[|] 4,096 per sequence\n"));
  EXPECT_THAT(text, ContainsRegex("\n    3 [|] .*[|] of layer 1 +[|] 0\n"));
  // 4 full layers of 100 tokens, 4 windows of 64 tokens, one state.
  EXPECT_THAT(text,
              HasSubstr("4 x 100 x 512 + 4 x min(100, 64) x 512 + 1 x 4,096 = 339,968 bytes"));
  EXPECT_THAT(text, HasSubstr("missing: recurrent mixer mamba2 (layer 0), "
                              "cache of an earlier layer (layer 3)"));
  EXPECT_THAT(text, Not(HasSubstr("missing: nothing")));
}

}  // namespace
}  // namespace longspan
