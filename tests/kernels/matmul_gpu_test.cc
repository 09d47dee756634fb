// The GPU's products against the CPU's, over all weight types, rows on both sides of every choice
// of kernel, and sizes that fill no tile; and the law of a deterministic backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::DecodeRow;
using testing::kWeightTypes;
using testing::RandomFloats;
using testing::RandomWeights;
using testing::Weights;

class CudaMatMul : public ::testing::Test {
 protected:
  explicit CudaMatMul(bool deterministic = false) : deterministic_(deterministic) {}
  void SetUp() override {
    std::string why;
    gpu_ = Backend::Cuda({.deterministic = deterministic_}, &why);
    if (gpu_ == nullptr) GTEST_SKIP() << why;
    cpu_ = Backend::Cpu({.threads = 8});
  }

  // x is F32, or BF16 if `narrow`, when out may be too. Keeps what ProductInput says.
  std::vector<float> Multiply(Backend& backend, const std::vector<float>& x, int64_t rows,
                              const std::vector<Weights>& parts, bool narrow = false,
                              DType out_type = DType::kF32) {
    int64_t columns = 0, bytes = 0;
    for (const Weights& part : parts) {
      columns += part.rows;
      bytes += std::max(backend.WeightBytes(part.view()), part.view().bytes());
    }
    const int64_t in = parts[0].columns;
    // One allocation, as the loader makes it: parts that follow each other may be joined.
    const Buffer weights = backend.Allocate(bytes);
    const Buffer x_memory = backend.Allocate(x.size() * sizeof(float)),
                 out_memory = backend.Allocate(rows * columns * sizeof(float));
    backend.CopyIn(x_memory.data(), x.data(), x.size() * sizeof(float));
    MatMulArgs args;
    args.part_count = 0;
    std::byte* at = weights.data();
    for (const Weights& part : parts) {
      args.parts[args.part_count++] = testing::Place(backend, part.view(), at);
      at += std::max(backend.WeightBytes(part.view()), part.view().bytes());
    }
    args.x = View::Matrix(x_memory.data(), DType::kF32, rows, in);
    args.out = View::Matrix(out_memory.data(), out_type, rows, columns);
    input_ = backend.ProductInput(args);
    if (narrow) {
      std::vector<uint16_t> rounded(x.size());
      std::transform(x.begin(), x.end(), rounded.begin(), ToBf16);
      backend.CopyIn(x_memory.data(), rounded.data(), rounded.size() * sizeof(uint16_t));
      args.x.dtype = DType::kBF16;
    }
    backend.Run(backend.ops().MatMul, args);
    std::vector<float> out(rows * columns);
    if (out_type == DType::kF32) {
      backend.CopyOut(out.data(), out_memory.data(), args.out.bytes());
    } else {
      std::vector<uint16_t> rounded(out.size());
      backend.CopyOut(rounded.data(), out_memory.data(), args.out.bytes());
      std::transform(rounded.begin(), rounded.end(), out.begin(), FromBf16);
    }
    EXPECT_EQ(backend.Fault(), "");
    return out;
  }

  // Of the sum of |weight * x|. Sums of fp32 in another order: 2^-24 for each of `in` additions. x
  // as two bf16 loses 2^-17 of itself, as one 2^-9; block weights as bf16 lose 2^-9 more.
  double Tolerance(DType type, int64_t rows, int64_t in) const {
    const double sums = 0x1p-24 * static_cast<double>(in);
    if (deterministic_) rows = IsQuantised(type) ? 1 : INT64_MAX;  // its one form
    if (type == DType::kF32) return sums + 0x1p-12;                // cuBLAS may take TF32's inputs
    if (IsQuantised(type)) return rows <= 32 ? sums + 0x1p-20 : sums + 0x1p-7;
    return rows <= 8 ? sums + 0x1p-16 : sums + 0x1p-8;
  }

  void ExpectSame(DType type, int64_t rows, int64_t in, const std::vector<int64_t>& columns) {
    const std::vector<float> x = RandomFloats(rows * in, random_);
    std::vector<Weights> parts;
    int64_t all = 0;
    for (const int64_t n : columns) {
      parts.push_back(RandomWeights(type, n, in, random_));
      all += n;
    }
    const std::vector<float> got = Multiply(*gpu_, x, rows, parts),
                             expected = Multiply(*cpu_, x, rows, parts);
    const double tolerance = Tolerance(type, rows, in);
    int64_t column = 0;
    int wrong = 0;
    for (const Weights& part : parts) {
      for (int64_t n = 0; n < part.rows; ++n, ++column) {
        const std::vector<double> w = DecodeRow(part, n);
        for (int64_t r = 0; r < rows; ++r) {
          double size = 0;
          for (int64_t i = 0; i < in; ++i) size += std::fabs(w[i] * x[r * in + i]);
          const float a = got[r * all + column], b = expected[r * all + column];
          if (std::fabs(a - b) <= tolerance * size || ++wrong > 3) continue;
          ADD_FAILURE() << Info(type).name << ", " << rows << " rows of " << in << ", column "
                        << column << " of " << all << ", row " << r << ": " << a << " instead of "
                        << b << ", " << std::fabs(a - b) / size << " of the terms' sum";
        }
      }
    }
    EXPECT_EQ(wrong, 0);
  }

  const bool deterministic_;
  std::unique_ptr<Backend> gpu_, cpu_;
  DType input_ = DType::kF32;
  std::mt19937 random_{1};
};

TEST_F(CudaMatMul, EqualsTheCpusOverWeightTypesAndRows) {
  for (const DType type : kWeightTypes) {
    for (const int64_t rows : {1, 2, 5, 8, 9, 16, 17, 32, 33, 100}) {
      ExpectSame(type, rows, 512, {96, 32, 32});
    }
  }
}

TEST_F(CudaMatMul, EqualsTheCpusAtModelsShapesAndOddOnes) {
  for (const int64_t rows : {1, 3, 8, 24, 32}) {
    ExpectSame(DType::kBF16, rows, 2560, {2048, 1024, 1024});  // Gemma 3 4B: q, k and v
    ExpectSame(DType::kBF16, rows, 10240, {640});
    ExpectSame(DType::kBF16, rows, 384, {384, 128, 128});  // the default model
    ExpectSame(DType::kBF16, rows, 32, {1});
    ExpectSame(DType::kBF16, rows, 96, {17, 5});
    ExpectSame(DType::kBF16, rows, 100, {33});  // in whole vectors of 4, not of 8
    ExpectSame(DType::kF16, rows, 256, {40});
    ExpectSame(DType::kF32, rows, 260, {24});
  }
  for (const int64_t rows : {1, 4, 8}) {
    for (const DType type : {DType::kQ4_K, DType::kQ6_K, DType::kQ8_0}) {
      ExpectSame(type, rows, 2560, {2048, 1024, 1024});
      ExpectSame(type, rows, 10240, {640});
      ExpectSame(type, rows, 21504, {203});  // Gemma 3 27B's: 4 rows of x in parts
      ExpectSame(type, rows, 256, {9000});   // blocks of threads with several items, and one strip
    }
  }
  for (const int64_t rows : {1, 2, 3, 4}) {  // steps and slices in part, also where x is shared
    for (const DType type : {DType::kQ4_0, DType::kQ5_0, DType::kQ8_0}) {
      ExpectSame(type, rows, 672, {300});
      ExpectSame(type, rows, 4128, {203});
    }
    ExpectSame(DType::kQ5_K, rows, 4352, {203});
    ExpectSame(DType::kBF16, rows, 4160, {203});
  }
  ExpectSame(DType::kBF16, 2, 64, {20000});  // blocks enough for two tiles each
  ExpectSame(DType::kBF16, 32, 288, {16000, 4001});
}

TEST_F(CudaMatMul, OfRoundedRowsIsTheSameWhereItRoundsThem) {
  constexpr int64_t kIn = 512;
  const auto rounds = [&](const std::vector<DType>& types, int64_t rows) {
    const std::vector<float> x = RandomFloats(rows * kIn, random_);
    std::vector<Weights> parts;
    for (const DType type : types) parts.push_back(RandomWeights(type, 96, kIn, random_));
    const std::vector<float> out = Multiply(*gpu_, x, rows, parts);
    if (input_ == DType::kF32) return false;
    EXPECT_EQ(Multiply(*gpu_, x, rows, parts, /*narrow=*/true), out);
    return true;
  };
  for (const DType type : kWeightTypes) {
    for (const int64_t rows : {1, 8, 9, 32, 33, 300}) {
      EXPECT_EQ(rounds({type, type}, rows),
                type == DType::kBF16 ? rows > 8 : IsQuantised(type) && rows > 32)
          << Info(type).name << ", " << rows << " rows";
    }
  }
  EXPECT_TRUE(rounds({DType::kQ4_K, DType::kQ6_K, DType::kBF16}, 40));
  EXPECT_FALSE(rounds({DType::kQ4_K, DType::kBF16}, 20));
  EXPECT_FALSE(rounds({DType::kBF16, DType::kF16}, 40));
}

// The library may add in another order for it: 2^-24 for each of `in` additions, of terms that are
// at most sqrt(in) times their sum's size here.
TEST_F(CudaMatMul, ABf16OutIsTheF32OneRounded) {
  constexpr int64_t kIn = 512;
  for (const int64_t rows : {9, 40, 300}) {
    const std::vector<float> x = RandomFloats(rows * kIn, random_);
    const std::vector<Weights> parts = {RandomWeights(DType::kBF16, 192, kIn, random_),
                                        RandomWeights(DType::kBF16, 192, kIn, random_)};
    const std::vector<float> wide = Multiply(*gpu_, x, rows, parts, /*narrow=*/true),
                             half = Multiply(*gpu_, x, rows, parts, /*narrow=*/true, DType::kBF16);
    double size = 0;
    for (const float y : wide) size = std::max<double>(size, std::fabs(y));
    for (size_t i = 0; i < wide.size(); ++i) {
      ASSERT_NEAR(half[i], wide[i], std::fabs(wide[i]) * 0x1p-8 + size * kIn * 0x1p-24) << i;
    }
  }
}

TEST_F(CudaMatMul, TakesNoRoundedRowsThatAreNotInWholeVectors) {
  constexpr int64_t kIn = 100, kRows = 40;
  Multiply(*gpu_, RandomFloats(kRows * kIn, random_), kRows,
           {RandomWeights(DType::kBF16, 32, kIn, random_)});
  EXPECT_EQ(input_, DType::kF32);
}

TEST_F(CudaMatMul, ARowIsTheSameBesideAnyFewOthers) {
  constexpr int64_t kRows = 8;
  for (const auto& [in, columns] :
       {std::pair<int64_t, int64_t>{1280, 300}, {10240, 64}, {32, 9000}}) {
    const std::vector<float> x = RandomFloats(kRows * in, random_);
    const std::vector<Weights> weights = {RandomWeights(DType::kBF16, columns, in, random_)};
    const std::vector<float> together = Multiply(*gpu_, x, kRows, weights);
    for (const int64_t rows : {2, 5}) {
      for (int64_t r = 0; r + rows <= kRows; ++r) {
        const std::vector<float> some(x.begin() + r * in, x.begin() + (r + rows) * in);
        const std::vector<float> out = Multiply(*gpu_, some, rows, weights);
        EXPECT_TRUE(std::equal(out.begin(), out.end(), together.begin() + r * columns)) << r;
      }
    }
  }
}

// Streamed ones among themselves, and all others.
TEST_F(CudaMatMul, ARowTimesBlocksIsTheSameBesideAnyFewOthers) {
  constexpr int64_t kIn = 1280, kColumns = 300;
  const std::vector<std::pair<int64_t, std::vector<int64_t>>> kinds = {{4, {2, 3}},
                                                                       {32, {5, 8, 9, 16, 17, 31}}};
  for (const DType type : kWeightTypes) {
    if (!IsQuantised(type)) continue;
    for (const auto& [most, fewer] : kinds) {
      const std::vector<float> x = RandomFloats(most * kIn, random_);
      const std::vector<Weights> weights = {RandomWeights(type, kColumns, kIn, random_)};
      const std::vector<float> together = Multiply(*gpu_, x, most, weights);
      for (const int64_t rows : fewer) {
        for (const int64_t first : {int64_t{0}, int64_t{1}, most - rows}) {
          const std::vector<float> some(x.begin() + first * kIn, x.begin() + (first + rows) * kIn);
          const std::vector<float> out = Multiply(*gpu_, some, rows, weights);
          EXPECT_TRUE(std::equal(out.begin(), out.end(), together.begin() + first * kColumns))
              << Info(type).name << ", " << rows << " rows from " << first << " of " << most;
        }
      }
    }
  }
}

class DeterministicMatMul : public CudaMatMul {
 protected:
  DeterministicMatMul() : CudaMatMul(/*deterministic=*/true) {}

  // Rows among 513 are the same to the bit among fewer, wherever they stand.
  void ExpectRowsAlone(DType type, int64_t in, const std::vector<int64_t>& columns) {
    constexpr int64_t kRows = 513;
    const std::vector<float> x = RandomFloats(kRows * in, random_);
    std::vector<Weights> parts;
    int64_t all = 0;
    for (const int64_t n : columns) {
      parts.push_back(RandomWeights(type, n, in, random_));
      all += n;
    }
    const std::vector<float> together = Multiply(*gpu_, x, kRows, parts);
    for (const int64_t rows : {1, 2, 7, 8, 9, 16, 17, 33, 65, 100}) {
      for (const int64_t first : {int64_t{0}, int64_t{211}, kRows - rows}) {
        const std::vector<float> some(x.begin() + first * in, x.begin() + (first + rows) * in);
        const std::vector<float> out = Multiply(*gpu_, some, rows, parts);
        const auto* got = reinterpret_cast<const uint32_t*>(out.data());
        const auto* want = reinterpret_cast<const uint32_t*>(together.data()) + first * all;
        ASSERT_TRUE(std::equal(got, got + out.size(), want))
            << Info(type).name << ", " << rows << " rows of " << in << " from " << first << ", "
            << all << " columns";
      }
    }
  }
};

TEST_F(DeterministicMatMul, ARowIsTheSameAloneAndAmongAnyOthersOverWeightTypes) {
  for (const DType type : kWeightTypes) {
    ExpectRowsAlone(type, 512, {96, 32, 32});
    ExpectRowsAlone(type, 1280, {33});
  }
}

TEST_F(DeterministicMatMul, ARowIsTheSameAloneAndAmongAnyOthersAtOddShapes) {
  for (const DType type : {DType::kBF16, DType::kF16, DType::kF32}) {
    ExpectRowsAlone(type, 96, {17, 5});
    ExpectRowsAlone(type, 100, {33});  // in no whole vectors
    ExpectRowsAlone(type, 33, {1});
  }
  ExpectRowsAlone(DType::kBF16, 384, {8517});         // large tiles from 65 rows on
  ExpectRowsAlone(DType::kBF16, 968, {2200, 9});      // a last part of less than a stage
  ExpectRowsAlone(DType::kBF16, 10240, {640});        // Gemma 3 4B's longest sums
  ExpectRowsAlone(DType::kQ4_K, 2560, {2048, 1024});  // and its widest blocks
}

TEST_F(DeterministicMatMul, EqualsTheCpus) {
  for (const DType type : kWeightTypes) {
    for (const int64_t rows : {1, 9, 33, 100}) ExpectSame(type, rows, 512, {96, 32, 32});
  }
  for (const int64_t rows : {1, 24, 100}) {
    ExpectSame(DType::kBF16, rows, 384, {8517});
    ExpectSame(DType::kBF16, rows, 2560, {2048, 1024, 1024});
    ExpectSame(DType::kF16, rows, 100, {33});
    ExpectSame(DType::kBF16, rows, 33, {17, 5});
  }
}

TEST_F(DeterministicMatMul, TakesOneInputAtAnyNumberOfRows) {
  constexpr int64_t kIn = 512;
  for (const DType type : kWeightTypes) {
    const std::vector<Weights> parts = {RandomWeights(type, 96, kIn, random_),
                                        RandomWeights(type, 40, kIn, random_)};
    for (const int64_t rows : {1, 8, 40, 300}) {
      const std::vector<float> x = RandomFloats(rows * kIn, random_);
      const std::vector<float> out = Multiply(*gpu_, x, rows, parts);
      EXPECT_EQ(input_, type == DType::kBF16 ? DType::kBF16 : DType::kF32);
      if (input_ == DType::kF32) continue;
      EXPECT_EQ(Multiply(*gpu_, x, rows, parts, /*narrow=*/true), out) << rows;
    }
  }
}

}  // namespace
}  // namespace longspan
