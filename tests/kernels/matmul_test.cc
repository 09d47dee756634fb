// MatMul on every instruction set that this machine has.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/backend.h"
#include "kernels/convert.h"
#include "kernels/cpu/simd.h"
#include "tests/support/simds.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::DecodeRow;
using testing::kWeightTypes;
using testing::PlacedWeights;
using testing::RandomFloats;
using testing::RandomWeights;
using testing::Weights;

constexpr double kEpsilon = 0x1p-24;  // half the spacing of fp32 at 1

std::vector<float> Multiply(Backend& backend, const std::vector<float>& x, int64_t rows,
                            std::initializer_list<const Weights*> parts) {
  const int64_t in = (*parts.begin())->columns;
  MatMulArgs args;
  args.part_count = 0;
  int64_t columns = 0;
  std::vector<PlacedWeights> placed;
  for (const Weights* part : parts) {
    args.parts[args.part_count++] = placed.emplace_back(backend, part->view()).view;
    columns += part->rows;
  }
  std::vector<float> out(rows * columns, NAN);
  args.x = View::Matrix(const_cast<float*>(x.data()), DType::kF32, rows, in);
  args.out = View::Matrix(out.data(), DType::kF32, rows, columns);
  backend.Run(backend.ops().MatMul, args);
  return out;
}

// One row of activations as the block kernels see it: int8 per 32 elements with one fp32 scale.
std::vector<double> QuantiseActivations(const float* x, int64_t in) {
  std::vector<double> result(in);
  for (int64_t g = 0; g < in; g += 32) {
    float largest = 0;
    for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(x[g + i]));
    if (largest == 0) continue;
    const float inverse = 127 / largest;
    const float scale = largest / 127;
    for (int i = 0; i < 32; ++i) {
      result[g + i] = static_cast<double>(scale) * std::nearbyint(x[g + i] * inverse);
    }
  }
  return result;
}

class MatMul : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!MachineRuns(*ParseSimd(GetParam()))) {
      GTEST_SKIP() << "this processor has no " << GetParam();
    }
  }
  std::unique_ptr<Backend> Open(int threads) {
    return Backend::Cpu({.threads = threads, .simd = GetParam()});
  }
  bool rounds() const { return ParseSimd(GetParam()) == Simd::kAvx512Bf16; }
};

INSTANTIATE_TEST_SUITE_P(Simd, MatMul, ::testing::ValuesIn(testing::BuiltSimds()),
                         [](const auto& info) { return std::string(info.param); });

// `rounds`: x becomes BF16 where the weights are.
void ExpectProduct(const Weights& w, const std::vector<float>& x, int64_t rows,
                   const std::vector<float>& out, bool rounds) {
  for (int64_t c = 0; c < w.rows; ++c) {
    const std::vector<double> weights = DecodeRow(w, c);
    double largest = 0;
    for (double value : weights) largest = std::max(largest, std::fabs(value));
    for (int64_t r = 0; r < rows; ++r) {
      const float* row = x.data() + r * w.columns;
      std::vector<double> quantised(row, row + w.columns);
      if (IsQuantised(w.type)) {
        quantised = QuantiseActivations(row, w.columns);
      } else if (rounds && w.type == DType::kBF16) {
        for (double& value : quantised) value = FromBf16(ToBf16(static_cast<float>(value)));
      }
      double exact = 0, near = 0, magnitude = 0, step_error = 0;
      for (int64_t i = 0; i < w.columns; ++i) {
        exact += weights[i] * row[i];
        near += weights[i] * quantised[i];
        magnitude += largest * std::fabs(quantised[i]);
        step_error += std::fabs(weights[i]) * std::fabs(quantised[i] - row[i]);
      }
      // Every element enters a chain of at most columns / 4 fp32 roundings; block kernels add at
      // most four per group of 16. Levels and mins apart are at most twice the largest weight.
      const double rounding = kEpsilon * (w.columns / 4 + 16) * 2 * magnitude;
      const float got = out[r * w.rows + c];
      ASSERT_NEAR(got, near, rounding) << Info(w.type).name << " row " << r << " column " << c;
      // Quantising moves x by at most half a step, and no rounding beyond that is allowed.
      ASSERT_NEAR(got, exact, rounding + step_error) << Info(w.type).name;
    }
  }
}

TEST_P(MatMul, EqualsTheDoubleProductOfDecodedWeights) {
  std::mt19937 random(1);
  auto backend = Open(2);
  const int64_t row_counts[] = {1, 2, 3, 4, 5, 7, 8, 13, 70};
  for (DType type : kWeightTypes) {
    for (int64_t columns : {1, 8, 15, 16, 17, 53}) {
      const Weights w = RandomWeights(type, columns, IsQuantised(type) ? 512 : 384, random);
      for (int64_t rows : row_counts) {
        const std::vector<float> x = RandomFloats(rows * w.columns, random);
        ExpectProduct(w, x, rows, Multiply(*backend, x, rows, {&w}), rounds());
      }
    }
  }
}

TEST_P(MatMul, TakesInputsThatNoVectorDivides) {
  std::mt19937 random(2);
  auto backend = Open(2);
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (int64_t in : {1, 7, 17, 33, 100}) {
      const Weights w = RandomWeights(type, 13, in, random);
      for (int64_t rows : {1, 3, 11}) {
        const std::vector<float> x = RandomFloats(rows * in, random);
        ExpectProduct(w, x, rows, Multiply(*backend, x, rows, {&w}), rounds());
      }
    }
  }
  for (DType type : {DType::kQ8_0, DType::kQ4_0, DType::kQ5_0}) {
    for (int64_t in : {32, 96, 640}) {
      const Weights w = RandomWeights(type, 13, in, random);
      for (int64_t rows : {1, 3, 11}) {
        const std::vector<float> x = RandomFloats(rows * in, random);
        ExpectProduct(w, x, rows, Multiply(*backend, x, rows, {&w}), rounds());
      }
    }
  }
}

// The largest sums that a format can make: every level and every activation at its extreme.
TEST_P(MatMul, NeverOverflowsItsIntegerSums) {
  auto backend = Open(1);
  std::mt19937 random(3);
  for (DType type : kWeightTypes) {
    if (!IsQuantised(type)) continue;
    for (uint8_t fill : {0x00, 0xff, 0x80, 0x7f}) {
      Weights w = RandomWeights(type, 19, 512, random);
      const Weights scales = w;
      for (uint8_t& byte : w.bytes) byte = fill;
      for (size_t b = 0; b < w.bytes.size(); b += Info(type).block_bytes) {
        const int at = type == DType::kQ6_K ? 208 : 0;
        const int n = type == DType::kQ4_K || type == DType::kQ5_K ? 4 : 2;
        std::copy_n(scales.bytes.begin() + b + at, n, w.bytes.begin() + b + at);
      }
      // Pairs that 16-bit sums take at once go to the same and to opposite ends.
      for (const auto& [even, odd] : {std::pair{1, 1}, {-1, -1}, {1, -1}, {-1, 1}}) {
        for (int64_t rows : {1, 9}) {
          std::vector<float> x(rows * w.columns);
          for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 4 < 2 ? even : odd);
          ExpectProduct(w, x, rows, Multiply(*backend, x, rows, {&w}), rounds());
        }
      }
    }
  }
}

TEST_P(MatMul, GivesARowTheSameBitsWhateverItsNeighboursAndThreads) {
  std::mt19937 random(4);
  constexpr int64_t kRows = 37, kColumns = 45;
  for (DType type : kWeightTypes) {
    for (int64_t in : {256, 768}) {
      const Weights w = RandomWeights(type, kColumns, in, random);
      const std::vector<float> x = RandomFloats(kRows * in, random);
      const std::vector<float> all = Multiply(*Open(1), x, kRows, {&w});
      for (int threads = 1; threads <= 4; ++threads) {
        auto backend = Open(threads);
        for (int64_t count : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 37}) {
          const int64_t first = (kRows - count) / 2;
          const std::vector<float> some(x.begin() + first * in, x.begin() + (first + count) * in);
          const std::vector<float> out = Multiply(*backend, some, count, {&w});
          ASSERT_EQ(0, std::memcmp(out.data(), all.data() + first * kColumns, 4 * out.size()))
              << Info(type).name << " rows " << count << " threads " << threads;
        }
      }
    }
  }
}

// Integer dot products are exact, and what follows is one chain of fused products.
TEST(MatMulOfBlocks, GivesTheSameBitsOnEverySetButThePortableOne) {
  std::mt19937 random(10);
  for (DType type : kWeightTypes) {
    if (!IsQuantised(type)) continue;
    const Weights w = RandomWeights(type, 45, 768, random);
    for (int64_t rows : {1, 2, 3, 15}) {
      const std::vector<float> x = RandomFloats(rows * w.columns, random);
      std::vector<float> first;
      for (const char* simd : testing::RunnableSimds()) {
        if (ParseSimd(simd) == Simd::kPortable) continue;
        const std::vector<float> out =
            Multiply(*Backend::Cpu({.threads = 1, .simd = simd}), x, rows, {&w});
        if (first.empty()) first = out;
        ASSERT_EQ(0, std::memcmp(out.data(), first.data(), 4 * out.size()))
            << simd << " " << Info(type).name << " rows " << rows;
      }
    }
  }
}

// As the processor's manual has it: of a pair first the odd product, then the even one, each added
// by a fused multiply-add, denormals read as zero. So all machines with these instructions give the
// same bits.
TEST(MatMulRounded, AddsPairsAsTheManualSays) {
  if (!MachineRuns(Simd::kAvx512Bf16)) GTEST_SKIP() << "this processor has no avx512_bf16";
  std::mt19937 random(9);
  auto backend = Backend::Cpu({.threads = 1, .simd = "avx512_bf16"});
  constexpr int64_t kIn = 160, kOut = 7;
  Weights w = RandomWeights(DType::kBF16, kOut, kIn, random);
  std::vector<float> x = RandomFloats(kIn, random);
  const uint16_t denormal = 0x007f;  // 1.2e-38
  for (int64_t c = 0; c < kOut; ++c) std::memcpy(w.bytes.data() + 2 * (c * kIn + 33), &denormal, 2);
  x[33] = 1e37f;  // their product would count
  x[50] = 1e-39f;
  const auto normal = [](float v) { return std::isnormal(v) ? v : 0.0f; };
  const std::vector<float> out = Multiply(*backend, x, 1, {&w});
  for (int64_t c = 0; c < kOut; ++c) {
    const std::vector<double> weights = DecodeRow(w, c);
    float sum[16] = {};
    for (int64_t i = 0; i < kIn; i += 2) {
      float& lane = sum[i / 2 % 16];
      for (int64_t j : {i + 1, i}) {
        const float rounded = FromBf16(ToBf16(normal(x[j])));
        lane = std::fmaf(rounded, normal(static_cast<float>(weights[j])), lane);
      }
    }
    float l[8];
    for (int i = 0; i < 8; ++i) l[i] = sum[i] + sum[i + 8];
    EXPECT_EQ(out[c], ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7])));
  }
}

TEST_P(MatMul, PutsPartsOfAnyTypeSideBySide) {
  std::mt19937 random(5);
  auto backend = Open(3);
  const Weights a = RandomWeights(DType::kQ5_0, 37, 640, random);
  const Weights b = RandomWeights(DType::kQ8_0, 5, 640, random);
  const Weights c = RandomWeights(DType::kBF16, 21, 640, random);
  for (int64_t rows : {1, 2, 6, 19}) {
    const std::vector<float> x = RandomFloats(rows * 640, random);
    const std::vector<float> out = Multiply(*backend, x, rows, {&a, &b, &c});
    int64_t begin = 0;
    for (const Weights* part : {&a, &b, &c}) {
      const std::vector<float> alone = Multiply(*backend, x, rows, {part});
      for (int64_t r = 0; r < rows; ++r) {
        ASSERT_EQ(0, std::memcmp(out.data() + r * 63 + begin, alone.data() + r * part->rows,
                                 4 * part->rows));
      }
      begin += part->rows;
    }
  }
}

TEST_P(MatMul, LeavesMemoryBetweenStridedRowsAlone) {
  std::mt19937 random(6);
  auto backend = Open(2);
  constexpr int64_t kRows = 11, kIn = 256, kColumns = 21, kXStride = 300, kOutStride = 40;
  for (DType type : kWeightTypes) {
    const Weights w = RandomWeights(type, kColumns, kIn, random);
    std::vector<float> x = RandomFloats(kRows * kXStride, random);
    std::vector<float> dense;
    for (int64_t r = 0; r < kRows; ++r) {
      dense.insert(dense.end(), x.begin() + r * kXStride, x.begin() + r * kXStride + kIn);
    }
    const std::vector<float> expected = Multiply(*backend, dense, kRows, {&w});
    std::vector<float> out(kRows * kOutStride, 7.0f);
    MatMulArgs args;
    args.x = View::Matrix(x.data(), DType::kF32, kRows, kXStride).Columns(0, kIn);
    const PlacedWeights placed(*backend, w.view());
    args.parts[0] = placed.view;
    args.out = View::Matrix(out.data(), DType::kF32, kRows, kOutStride).Columns(3, kColumns);
    backend->Run(backend->ops().MatMul, args);
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < kOutStride; ++c) {
        const bool inside = c >= 3 && c < 3 + kColumns;
        ASSERT_EQ(out[r * kOutStride + c], inside ? expected[r * kColumns + c - 3] : 7.0f);
      }
    }
  }
}

TEST_P(MatMul, KeepsInfinityAndNanInTheirRow) {
  std::mt19937 random(7);
  auto backend = Open(1);
  for (float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
    for (DType type : kWeightTypes) {
      const Weights w = RandomWeights(type, 20, 256, random);
      std::vector<float> x = RandomFloats(5 * 256, random);
      const std::vector<float> clean = Multiply(*backend, x, 5, {&w});
      x[2 * 256 + 77] = bad;
      const std::vector<float> out = Multiply(*backend, x, 5, {&w});
      for (int64_t i = 0; i < 5 * 20; ++i) {
        if (i / 20 == 2) {
          EXPECT_FALSE(std::isfinite(out[i])) << Info(type).name;
        } else {
          EXPECT_EQ(out[i], clean[i]) << Info(type).name;
        }
      }
    }
  }
}

TEST_P(MatMul, GivesZeroForZeroAndTinyActivations) {
  std::mt19937 random(8);
  auto backend = Open(1);
  for (float value : {0.0f, 1e-38f, 1e-44f}) {
    for (DType type : kWeightTypes) {
      const Weights w = RandomWeights(type, 20, 256, random);
      const std::vector<float> x(2 * 256, value);
      // 256 weights below 2000 times 1e-38.
      for (float out : Multiply(*backend, x, 2, {&w})) EXPECT_NEAR(out, 0, 1e-32);
    }
  }
}

}  // namespace
}  // namespace longspan
