// GatedMatMul on the GPU, in one kernel or two, is the activation of what MatMul gives there.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/support/gated_product.h"
#include "tests/support/test_device.h"

namespace longspan {
namespace {

using testing::AllowanceOfSums;
using testing::ExpectActivated;
using testing::GatedProduct;
using testing::MultiplyGated;
using testing::RandomFloats;
using testing::RandomWeights;
using testing::Weights;

class CudaGatedMatMul : public ::testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    std::string why;
    gpu_ = Backend::Cuda({.deterministic = GetParam()}, &why);
    ASSERT_NE(gpu_, nullptr) << why;
  }

  void ExpectActivates(DType type, int64_t rows, int64_t in, int64_t dim, float scale = 4) {
    SCOPED_TRACE(std::string(Info(type).name) + ", " + std::to_string(rows) + " rows of " +
                 std::to_string(in) + ", dim " + std::to_string(dim));
    const Weights gate = RandomWeights(type, dim, in, random_),
                  up = RandomWeights(type, dim, in, random_);
    std::vector<float> x = RandomFloats(rows * in, random_);
    for (float& v : x) v *= scale / std::sqrt(static_cast<float>(in));
    // In streamed block weights the order of a sum depends on how many columns a block of threads
    // makes at once, hence on whether it is gated: each of in / 32 additions rounds a partial sum,
    // of at most some 8, by 2^-22.
    const bool streamed = IsQuantised(type) && rows <= 4 && !GetParam();
    const double sums = streamed ? static_cast<double>(in) / 32 * 0x1p-22 : 0;
    for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
      const GatedProduct single = MultiplyGated(*gpu_, x, rows, gate, up, activation);
      ExpectActivated(single, dim, activation, sums);
      GatedProduct half = MultiplyGated(*gpu_, x, rows, gate, up, activation, DType::kBF16);
      for (size_t i = 0; i < half.out.size(); ++i) {
        // Where one kernel made the F32 out, its exponential may round otherwise.
        ASSERT_NEAR(
            half.out[i], single.out[i],
            0x1p-8 * std::fabs(single.out[i]) + AllowanceOfSums(single, dim, i, sums) + 1e-37);
      }
    }
  }

  std::unique_ptr<Backend> gpu_;
  std::mt19937 random_{1};
};
INSTANTIATE_TEST_SUITE_P(Deterministic, CudaGatedMatMul, ::testing::Bool());

TEST_P(CudaGatedMatMul, EqualsTheFormulaOfWhatMatMulGivesOverWeightTypesAndRows) {
  for (const DType type : testing::kWeightTypes) {
    for (const int64_t rows : {1, 2, 3, 8, 9, 32, 33}) {
      ExpectActivates(type, rows, 512, 96);
      ExpectActivates(type, rows, 256, 37);  // fills no tile, and is odd
    }
  }
}

TEST_P(CudaGatedMatMul, EqualsTheFormulaOfWhatMatMulGivesAtModelsShapesAndOddOnes) {
  for (const int64_t rows : {1, 2, 3, 8, 9, 32}) {
    ExpectActivates(DType::kBF16, rows, 384, 960);     // the default model
    ExpectActivates(DType::kBF16, rows, 2560, 10240);  // Gemma 3 4B
    ExpectActivates(DType::kQ4_K, rows, 2560, 10240);
    for (const DType type : {DType::kBF16, DType::kF16, DType::kF32}) {
      ExpectActivates(type, rows, 100, 37);
      ExpectActivates(type, rows, 32, 1);
      ExpectActivates(type, rows, 33, 5);
    }
  }
  ExpectActivates(DType::kF16, 1, 64, 20001);  // a warp for each column
  ExpectActivates(DType::kF32, 1, 64, 20001);
  ExpectActivates(DType::kBF16, 5, 64, 20001);  // two tiles a block
}

TEST_P(CudaGatedMatMul, IsFiniteFarBeyondWhereExponentialsOverflow) {
  for (const int64_t rows : {1, 4, 40}) ExpectActivates(DType::kBF16, rows, 256, 512, 1000);
  ExpectActivates(DType::kF32, 1, 256, 512, 1000);
}

TEST_P(CudaGatedMatMul, TakesPartsThatLieApart) {
  for (const DType type : {DType::kBF16, DType::kF32}) {
    for (const int64_t rows : {1, 5, 20}) {
      for (const int64_t between : {256, 4}) {  // in whole vectors, and in none
        const Weights gate = RandomWeights(type, 40, 64, random_),
                      up = RandomWeights(type, 40, 64, random_);
        const std::vector<float> x = RandomFloats(rows * 64, random_);
        ExpectActivated(
            MultiplyGated(*gpu_, x, rows, gate, up, Activation::kSilu, DType::kF32, between), 40,
            Activation::kSilu);
      }
    }
  }
}

TEST_P(CudaGatedMatMul, ARowIsTheSameBesideAnyFewOthers) {
  constexpr int64_t kRows = 8, kIn = 1280, kDim = 300;
  const Weights gate = RandomWeights(DType::kBF16, kDim, kIn, random_),
                up = RandomWeights(DType::kBF16, kDim, kIn, random_);
  const std::vector<float> x = RandomFloats(kRows * kIn, random_);
  const auto out = [&](int64_t first, int64_t rows) {
    const std::vector<float> some(x.begin() + first * kIn, x.begin() + (first + rows) * kIn);
    return MultiplyGated(*gpu_, some, rows, gate, up, Activation::kGeluTanh).out;
  };
  const std::vector<float> together = out(0, kRows);
  for (const int64_t rows : {GetParam() ? 1 : 2, 5}) {
    for (int64_t r = 0; r + rows <= kRows; ++r) {
      const std::vector<float> some = out(r, rows);
      EXPECT_TRUE(std::equal(some.begin(), some.end(), together.begin() + r * kDim)) << r;
    }
  }
}

}  // namespace
}  // namespace longspan
