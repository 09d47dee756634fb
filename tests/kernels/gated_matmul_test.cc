// GatedMatMul against the formulas of its activations and against MatMul.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/support/gated_product.h"
#include "tests/support/simds.h"

namespace longspan {
namespace {

using testing::ExpectActivated;
using testing::GatedProduct;
using testing::MultiplyGated;
using testing::RandomFloats;
using testing::RandomWeights;
using testing::Weights;

constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGeluTanh};

class GatedMatMulOnEachSimd : public ::testing::TestWithParam<const char*> {
 protected:
  GatedMatMulOnEachSimd() : backend_(Backend::Cpu({.threads = 2, .simd = GetParam()})) {}
  std::unique_ptr<Backend> backend_;
  std::mt19937 random_{1};
};
INSTANTIATE_TEST_SUITE_P(Simd, GatedMatMulOnEachSimd,
                         ::testing::ValuesIn(testing::RunnableSimds()));

TEST_P(GatedMatMulOnEachSimd, EqualsTheFormulaOfWhatMatMulGives) {
  for (DType type : testing::kWeightTypes) {
    for (const int64_t dim : {37, 64}) {
      const Weights gate = RandomWeights(type, dim, 256, random_),
                    up = RandomWeights(type, dim, 256, random_);
      for (int64_t rows : {1, 3, 40}) {
        std::vector<float> x = RandomFloats(rows * 256, random_);
        for (float& v : x) v /= 4;
        for (Activation activation : kActivations) {
          SCOPED_TRACE(std::string(Info(type).name) + ", rows " + std::to_string(rows));
          ExpectActivated(MultiplyGated(*backend_, x, rows, gate, up, activation), dim, activation);
        }
      }
    }
  }
}

TEST_P(GatedMatMulOnEachSimd, IsFiniteFarBeyondWhereExponentialsOverflow) {
  const int64_t dim = 3;
  Weights gate = RandomWeights(DType::kF32, dim, 1, random_), up = gate;
  const float far[dim] = {200, -200, 0};
  std::memcpy(gate.bytes.data(), far, sizeof far);
  for (Activation activation : kActivations) {
    const GatedProduct p = MultiplyGated(*backend_, {1}, 1, gate, up, activation);
    EXPECT_EQ(p.gate_up[0], 200);
    ExpectActivated(p, dim, activation);
  }
}

TEST_P(GatedMatMulOnEachSimd, ARowDependsOnNoOther) {
  const Weights gate = RandomWeights(DType::kBF16, 37, 100, random_),
                up = RandomWeights(DType::kBF16, 37, 100, random_);
  const std::vector<float> x = RandomFloats(20 * 100, random_);
  const std::vector<float> all = MultiplyGated(*backend_, x, 20, gate, up, Activation::kSilu).out;
  for (int row = 0; row < 20; ++row) {
    const std::vector<float> alone(x.begin() + row * 100, x.begin() + (row + 1) * 100);
    const std::vector<float> out =
        MultiplyGated(*backend_, alone, 1, gate, up, Activation::kSilu).out;
    EXPECT_TRUE(std::equal(out.begin(), out.end(), all.begin() + row * 37)) << row;
  }
}

TEST(Cost, OfGatedMatMulIsThatOfItsProductAndActivationWithoutWhatLiesBetween) {
  float memory[1];
  const auto matrix = [&](int64_t rows, int64_t columns) {
    return View::Matrix(memory, DType::kF32, rows, columns);
  };
  const GatedMatMulArgs args = {{matrix(3, 8), {matrix(5, 8), matrix(5, 8)}, 2, matrix(3, 10)},
                                matrix(3, 5)};
  EXPECT_EQ(Cost(args).bytes, 4 * (3 * 8 + 2 * 5 * 8 + 3 * 5));
  EXPECT_EQ(Cost(args).flops, 2 * 3 * 8 * 10 + 5 * 3 * 5);
  EXPECT_EQ(KindOf(args), "F32 8x5+5");
}

}  // namespace
}  // namespace longspan
