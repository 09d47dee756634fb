#include "kernels/cpu/blocks.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/convert.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::DecodeHalf;
using testing::DecodeRow;
using testing::EncodeHalf;
using testing::RandomWeights;
using testing::Weights;

TEST(Half, WidensEveryValueExactly) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float value = HalfToFloat(bits);
    if ((bits & 0x7c00) != 0x7c00) {
      ASSERT_EQ(value, DecodeHalf(bits)) << bits;
      ASSERT_EQ(std::signbit(value), bits >> 15 != 0);
    } else if ((bits & 0x3ff) == 0) {
      ASSERT_EQ(value, bits >> 15 ? -INFINITY : INFINITY);
    } else {
      ASSERT_TRUE(std::isnan(value)) << bits;
    }
  }
}

TEST(Half, RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const double low = DecodeHalf(bits), high = DecodeHalf(bits + 1);
    const auto middle = static_cast<float>((low + high) / 2);  // exact
    ASSERT_EQ(ToF16(static_cast<float>(low)), bits);
    ASSERT_EQ(ToF16(static_cast<float>(-high)), (bits + 1) | 0x8000);
    ASSERT_EQ(ToF16(std::nextafter(middle, 0.0f)), bits);
    ASSERT_EQ(ToF16(middle), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(ToF16(std::nextafter(middle, INFINITY)), bits + 1);
    ASSERT_EQ(EncodeHalf(middle), ToF16(middle));
  }
  EXPECT_EQ(ToF16(std::nextafter(65520.0f, 0.0f)), 0x7bff);
  EXPECT_EQ(ToF16(65520.0f), 0x7c00);
  EXPECT_EQ(ToF16(-INFINITY), 0xfc00);
  EXPECT_TRUE(std::isnan(HalfToFloat(ToF16(NAN))));
}

TEST(Brain, RoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7f7f; ++bits) {
    const float low = BrainToFloat(bits), high = BrainToFloat(bits + 1);
    // Half way is exact in fp32: bfloat16 is its upper half.
    const float middle = std::bit_cast<float>(bits << 16 | 0x8000u);
    ASSERT_TRUE(low < middle && middle < high);
    ASSERT_EQ(ToBf16(low), bits);
    ASSERT_EQ(ToBf16(-high), (bits + 1) | 0x8000);
    ASSERT_EQ(ToBf16(middle), bits % 2 == 0 ? bits : bits + 1);
    ASSERT_EQ(ToBf16(std::nextafter(middle, INFINITY)), bits + 1);
  }
  EXPECT_EQ(ToBf16(INFINITY), 0x7f80);
  EXPECT_TRUE(std::isnan(BrainToFloat(ToBf16(std::bit_cast<float>(0x7f800001u)))));
}

// A value is a product of two or three numbers and at most one difference, each rounded once: four
// half-spacings of the largest term, which is below twice the largest value of the row.
TEST(DequantiseRow, EqualsTheFormatsDefinition) {
  std::mt19937 random(1);
  for (DType type : testing::kWeightTypes) {
    const Weights w = RandomWeights(type, 40, 1024, random);
    for (int64_t r = 0; r < w.rows; ++r) {
      std::vector<float> got(w.columns);
      DequantiseRow(type, w.view().row(r), w.columns, got.data());
      const std::vector<double> expected = DecodeRow(w, r);
      double largest = 0;
      for (double value : expected) largest = std::max(largest, std::fabs(value));
      const double tolerance = IsQuantised(type) ? 8 * 0x1p-24 * largest : 0;
      for (int64_t i = 0; i < w.columns; ++i) {
        ASSERT_NEAR(got[i], expected[i], tolerance) << Info(type).name << " element " << i;
      }
    }
  }
}

// The numbers of one block, worked out by hand.
TEST(DequantiseRow, ReadsAQ4KBlock) {
  BlockQ4_K block = {};
  block.d = 0x3c00;     // 1
  block.dmin = 0x3800;  // 0.5
  block.scales[1] = 3;  // group 1: scale 3, min 10
  block.scales[5] = 10;
  block.scales[2] = 0xc0;   // upper bits of scale 6: 48
  block.scales[10] = 0x21;  // group 6: scale 48 + 1, min 2
  block.q[0] = 0x90;        // element 32: level 9
  block.q[96 + 31] = 0x07;  // element 192 + 31: level 7
  float out[256];
  DequantiseRow(DType::kQ4_K, reinterpret_cast<std::byte*>(&block), 256, out);
  EXPECT_EQ(out[0], 0);
  EXPECT_EQ(out[32], 3 * 9 - 5);
  EXPECT_EQ(out[33], -5);
  EXPECT_EQ(out[223], 49 * 7 - 1);
  EXPECT_EQ(out[192], -1);
  EXPECT_EQ(out[255], 0);
}

}  // namespace
}  // namespace longspan
