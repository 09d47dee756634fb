#include "kernels/cpu/panels.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/simds.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::DecodeRow;
using testing::PlacedWeights;
using testing::RandomWeights;
using testing::Weights;

// 37 outputs leave the last panel part empty.
TEST(PackedPanels, HoldEveryElementOfTheirRowsAndTheSameBytesOnEverySimd) {
  std::mt19937 random(1);
  for (DType type : testing::kWeightTypes) {
    if (!IsQuantised(type)) continue;
    for (int64_t in : {256, 1024}) {
      const Weights w = RandomWeights(type, 37, in, random);
      std::vector<uint8_t> first;
      for (const char* simd : testing::RunnableSimds()) {
        auto backend = Backend::Cpu({.threads = 2, .simd = simd});
        const PlacedWeights placed(*backend, w.view());
        ASSERT_TRUE(placed.view.packed);
        for (int64_t r = 0; r < w.rows; ++r) {
          std::vector<float> got(in);
          cpu::DequantisePackedRow(placed.view, r, got.data());
          const std::vector<double> expected = DecodeRow(w, r);
          double largest = 0;
          for (double value : expected) largest = std::max(largest, std::fabs(value));
          for (int64_t i = 0; i < in; ++i) {
            // As DequantiseRow: four roundings of at most twice the largest value.
            ASSERT_NEAR(got[i], expected[i], 8 * 0x1p-24 * largest)
                << simd << " " << Info(type).name << " row " << r << " element " << i;
          }
        }
        const auto* bytes = placed.view.as<const uint8_t>();
        std::vector<uint8_t> packed(bytes, bytes + backend->WeightBytes(w.view()));
        if (first.empty()) first = packed;
        EXPECT_EQ(packed, first) << simd << " " << Info(type).name;
      }
    }
  }
}

// Three panels of 16 outputs, K types with a byte for each scale and min of a group that files hold
// in 12 bytes for 8 groups.
TEST(PackedPanels, TakeNoMoreBitsForALevelThanFilesDo) {
  const struct {
    DType type;
    int64_t bytes_per_256;
  } cases[] = {{DType::kQ8_0, 272}, {DType::kQ4_0, 144}, {DType::kQ5_0, 176},
               {DType::kQ4_K, 148}, {DType::kQ5_K, 180}, {DType::kQ6_K, 210}};
  auto backend = Backend::Cpu({.threads = 1});
  for (const auto& [type, bytes] : cases) {
    const View matrix = View::Matrix(nullptr, type, 37, 1024);
    EXPECT_EQ(backend->WeightBytes(matrix), 48 * 4 * bytes) << Info(type).name;
  }
  EXPECT_EQ(backend->WeightBytes(View::Matrix(nullptr, DType::kBF16, 37, 1024)), 0);
}

}  // namespace
}  // namespace longspan
