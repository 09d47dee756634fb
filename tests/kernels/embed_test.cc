#include <gtest/gtest.h>

#include <cmath>

#include "kernels/backend.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::DecodeRow;

TEST(Embed, GivesScaledRowsOfAnyWeightType) {
  std::mt19937 random(1);
  auto backend = Backend::Cpu({.threads = 3});
  int32_t tokens[] = {5, 0, 36, 5, 12, 36, 1};
  constexpr int64_t kDim = 512, kStride = 520;
  for (DType type : testing::kWeightTypes) {
    const testing::Weights table = testing::RandomWeights(type, 37, kDim, random);
    std::vector<float> out(7 * kStride, -1.0f);
    const testing::PlacedWeights placed(*backend, table.view());
    EmbedArgs args;
    args.table = placed.view;
    args.tokens = View::Vector(tokens, DType::kI32, 7);
    args.out = View::Matrix(out.data(), DType::kF32, 7, kStride).Columns(4, kDim);
    args.scale = 25.25f;
    backend->Run(backend->ops().Embed, args);
    for (int64_t r = 0; r < 7; ++r) {
      const std::vector<double> row = DecodeRow(table, tokens[r]);
      double largest = 0;
      for (double value : row) largest = std::max(largest, std::fabs(value));
      for (int64_t i = 0; i < kDim; ++i) {
        // As DequantiseRow, and one more rounding.
        ASSERT_NEAR(out[r * kStride + 4 + i], 25.25 * row[i], 10 * 0x1p-24 * 25.25 * largest);
      }
      EXPECT_EQ(out[r * kStride + 3], -1);
      EXPECT_EQ(out[r * kStride + 4 + kDim], -1);
    }
  }
}

TEST(EmbedDeathTest, RefusesATokenBeyondTheVocabulary) {
  std::mt19937 random(1);
  const testing::Weights table = testing::RandomWeights(DType::kBF16, 10, 16, random);
  auto backend = Backend::Cpu({.threads = 1});
  std::vector<float> out(16);
  for (int32_t token : {-1, 10}) {
    EmbedArgs args;
    args.table = table.view();
    args.tokens = View::Vector(&token, DType::kI32, 1);
    args.out = View::Matrix(out.data(), DType::kF32, 1, 16);
    EXPECT_DEATH(backend->Run(backend->ops().Embed, args), "of a vocabulary of 10");
  }
}

}  // namespace
}  // namespace longspan
