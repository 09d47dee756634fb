// PrepareQkv against its formulas in double precision.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"
#include "kernels/cpu/blocks.h"
#include "tests/support/cache_pages.h"
#include "tests/support/travel.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::CachePages;
using testing::DecodeElement;
using testing::Encode;
using testing::RandomFloats;
using testing::Travel;

struct Shape {
  int heads = 4, kv_heads = 2, dim = 12, pairs = 4;  // pairs 4 of 6: the last four dims stay
  bool norm = true, interleaved = false;
  DType cache = DType::kF32;
  float magnitude = 1.25f;
};

// Rows of qkv inside wider rows, keys and values inside wider ones too.
struct Case {
  explicit Case(const Shape& s)
      : shape(s),
        columns((s.heads + 2 * s.kv_heads) * s.dim),
        kv_columns(s.kv_heads * s.dim),
        kv_stride(kv_columns + std::max(4, Info(s.cache).block_elements)) {
    std::mt19937 random(s.dim);
    qkv = RandomFloats(positions.size() * (columns + 8), random);
    query_norm = RandomFloats(s.dim, random);
    key_norm = RandomFloats(s.dim, random);
    for (int i = 0; i < s.pairs; ++i) {
      frequencies.push_back(std::pow(10000.0f, -static_cast<float>(i) / s.pairs));
    }
    before = qkv;
    key.assign(2 * positions.size() * kv_stride, 77.0f);
    value = key;
  }

  PrepareQkvArgs Args() {
    const auto kv = [&](std::vector<float>& to) {
      return View::Matrix(to.data(), shape.cache, positions.size(), kv_stride)
          .Columns(0, kv_columns)
          .Heads(shape.kv_heads);
    };
    PrepareQkvArgs args;
    args.qkv =
        View::Matrix(qkv.data(), DType::kF32, positions.size(), columns + 8).Columns(0, columns);
    if (shape.norm) {
      args.query_norm = View::Vector(query_norm.data(), DType::kF32, shape.dim);
      args.key_norm = View::Vector(key_norm.data(), DType::kF32, shape.dim);
    }
    args.positions = View::Vector(positions.data(), DType::kI32, positions.size());
    if (shape.pairs > 0) {
      args.frequencies = View::Vector(frequencies.data(), DType::kF32, shape.pairs);
    }
    args.key = kv(key);
    args.value = kv(value);
    args.interleaved = shape.interleaved;
    args.magnitude = shape.magnitude;
    args.eps = 1e-5f;
    return args;
  }

  // Head `head` of q | k | v of a row, as the formulas have it.
  std::vector<double> Want(size_t row, int head) const {
    const float* x = &before[row * (columns + 8) + head * shape.dim];
    std::vector<double> out(x, x + shape.dim);
    if (head >= shape.heads + shape.kv_heads) return out;
    if (shape.norm) {
      double squares = 0;
      for (double v : out) squares += v * v;
      const auto& weight = head < shape.heads ? query_norm : key_norm;
      for (int d = 0; d < shape.dim; ++d) {
        out[d] *= weight[d] / std::sqrt(squares / shape.dim + double{1e-5f});
      }
    }
    for (int i = 0; i < shape.pairs; ++i) {
      const int first = shape.interleaved ? 2 * i : i;
      const int second = shape.interleaved ? 2 * i + 1 : i + shape.pairs;
      // The angle is a float product, as in the reference models.
      const double angle = static_cast<float>(positions[row]) * frequencies[i];
      const double a = out[first], b = out[second];
      out[first] = shape.magnitude * (a * std::cos(angle) - b * std::sin(angle));
      out[second] = shape.magnitude * (b * std::cos(angle) + a * std::sin(angle));
    }
    return out;
  }

  // What was written for it.
  float Got(size_t row, int head, int d) const {
    if (head < shape.heads) return qkv[row * (columns + 8) + head * shape.dim + d];
    const int kv_head = (head - shape.heads) % shape.kv_heads;
    const auto& from = head < shape.heads + shape.kv_heads ? key : value;
    const size_t at = row * kv_stride + kv_head * shape.dim + d;
    return static_cast<float>(
        DecodeElement(shape.cache, reinterpret_cast<const uint8_t*>(from.data()), at));
  }

  // How far rounding to the cache's type may move element d of a head of these numbers.
  double Rounding(const std::vector<double>& head, int d) const {
    if (shape.cache == DType::kF32) return 0;
    if (shape.cache == DType::kBF16) return 0x1p-8 * std::fabs(head[d]);
    double largest = 0;
    for (int i = d / 32 * 32; i < d / 32 * 32 + 32; ++i) {
      largest = std::max(largest, std::fabs(head[i]));
    }
    return largest / 127 / 2 + 0x1p-11 * std::fabs(head[d]);  // half a level, and the scale's
  }

  Shape shape;
  int columns, kv_columns, kv_stride;
  std::vector<int32_t> positions = {0, 1, 77, 16383, 131071};
  std::vector<float> qkv, before, query_norm, key_norm, frequencies, key, value;
};

// Of memory that may read as NaN.
bool SameBytes(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), sizeof(float) * a.size()) == 0;
}

class PrepareQkvOnEachSimd : public ::testing::TestWithParam<const char*> {
 protected:
  PrepareQkvOnEachSimd() : backend_(Backend::Cpu({.threads = 2, .simd = GetParam()})) {}

  void ExpectEqualsFormula(const Shape& shape) {
    Case c(shape);
    backend_->Run(backend_->ops().PrepareQkv, c.Args());
    // Numbers of order one: fp32 roundings of a norm and a rotation, then the cache's own.
    for (size_t row = 0; row < c.positions.size(); ++row) {
      for (int head = 0; head < shape.heads + 2 * shape.kv_heads; ++head) {
        const std::vector<double> want = c.Want(row, head);
        for (int d = 0; d < shape.dim; ++d) {
          const double rounding = head < shape.heads ? 0 : c.Rounding(want, d);
          ASSERT_NEAR(c.Got(row, head, d), want[d], 3e-6 + 1.01 * rounding)
              << "row " << row << " head " << head << " channel " << d;
        }
      }
      for (int i = c.columns; i < c.columns + 8; ++i) {  // someone else's
        EXPECT_EQ(c.qkv[row * (c.columns + 8) + i], c.before[row * (c.columns + 8) + i]);
      }
      for (int i = c.kv_columns; i < c.kv_columns + 4 && shape.cache == DType::kF32; ++i) {
        EXPECT_EQ(c.key[row * c.kv_stride + i], 77.0f);
        EXPECT_EQ(c.value[row * c.kv_stride + i], 77.0f);
      }
    }
  }

  std::unique_ptr<Backend> backend_;
};
INSTANTIATE_TEST_SUITE_P(Simd, PrepareQkvOnEachSimd, ::testing::Values("portable", ""));

TEST_P(PrepareQkvOnEachSimd, EqualsItsFormula) {
  for (DType cache : {DType::kF32, DType::kBF16}) {
    for (bool norm : {false, true}) {
      for (int pairs : {0, 1, 4, 6}) {
        for (bool interleaved : {false, true}) {
          ExpectEqualsFormula(
              {.pairs = pairs, .norm = norm, .interleaved = interleaved, .cache = cache});
        }
      }
    }
  }
}

TEST_P(PrepareQkvOnEachSimd, EqualsItsFormulaAtEveryHeadSize) {
  for (int dim : {2, 33, 64, 80, 96, 128, 256}) {
    SCOPED_TRACE(dim);
    ExpectEqualsFormula({.heads = 3, .kv_heads = 1, .dim = dim, .pairs = dim / 2});
    ExpectEqualsFormula({.heads = 3,
                         .kv_heads = 3,
                         .dim = dim,
                         .pairs = dim / 4 + 1,
                         .interleaved = true,
                         .cache = DType::kBF16});
  }
  for (int dim : {32, 64, 96, 256}) {
    SCOPED_TRACE(dim);
    ExpectEqualsFormula({.kv_heads = 2, .dim = dim, .pairs = dim / 2, .cache = DType::kQ8_0});
  }
}

// Without a norm or positions keys and values are roundings: to the bit.
TEST_P(PrepareQkvOnEachSimd, RoundsKeysAndValuesToNearestEven) {
  Case c({.dim = 37, .pairs = 0, .norm = false, .cache = DType::kBF16});
  backend_->Run(backend_->ops().PrepareQkv, c.Args());
  for (size_t row = 0; row < c.positions.size(); ++row) {
    for (int head = c.shape.heads; head < c.shape.heads + 2 * c.shape.kv_heads; ++head) {
      for (int d = 0; d < c.shape.dim; ++d) {
        const float x = c.before[row * (c.columns + 8) + head * c.shape.dim + d];
        ASSERT_EQ(c.Got(row, head, d), FromBf16(ToBf16(x)));  // proven in blocks_test.cc
      }
    }
  }
}

// To Q8_0 likewise: the scale to the bit; a level is a quotient of 127 at most, which two roundings
// may carry over a tie.
TEST_P(PrepareQkvOnEachSimd, QuantisesKeysAndValuesAsGgufDoes) {
  Case c({.dim = 64, .pairs = 0, .norm = false, .cache = DType::kQ8_0});
  float* zeros = &c.qkv[c.shape.heads * c.shape.dim];
  std::fill(zeros, zeros + 32, 0.0f);
  c.before = c.qkv;
  backend_->Run(backend_->ops().PrepareQkv, c.Args());
  for (size_t row = 0; row < c.positions.size(); ++row) {
    for (int head = 0; head < 2 * c.shape.kv_heads; ++head) {
      const auto& to = head < c.shape.kv_heads ? c.key : c.value;
      const auto* got =
          reinterpret_cast<const uint8_t*>(to.data()) +
          BytesOf(DType::kQ8_0, row * c.kv_stride + head % c.shape.kv_heads * c.shape.dim);
      const float* x = &c.before[row * (c.columns + 8) + (c.shape.heads + head) * c.shape.dim];
      for (int block = 0; block < c.shape.dim / 32; ++block, got += 34, x += 32) {
        const std::vector<uint8_t> want = Encode(DType::kQ8_0, {x, x + 32});
        ASSERT_TRUE(std::equal(want.begin(), want.begin() + 2, got)) << "row " << row;
        double largest = 0;
        for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(double{x[i]}));
        for (int i = 0; i < 32; ++i) {
          const double level = largest == 0 ? 0 : x[i] * 127 / largest;
          ASSERT_NEAR(static_cast<int8_t>(got[2 + i]), level, 0.5 + 127 * 0x1p-23) << "row " << row;
        }
      }
    }
  }
}

TEST_P(PrepareQkvOnEachSimd, WhatIsNoNumberStaysNoneInQ8_0) {
  Case c({.dim = 64, .pairs = 0, .norm = false, .cache = DType::kQ8_0});
  for (const float x : {NAN, INFINITY}) {
    c.qkv = c.before;
    c.qkv[c.shape.heads * c.shape.dim + 40] = x;
    backend_->Run(backend_->ops().PrepareQkv, c.Args());
    const View key = c.Args().key;
    std::vector<float> got(c.shape.dim);
    DequantiseRow(DType::kQ8_0, key.row(0), c.shape.dim, got.data());
    for (int d = 0; d < c.shape.dim; ++d) EXPECT_EQ(std::isnan(got[d]), d >= 32) << d;
    DequantiseRow(DType::kQ8_0, key.row(1), c.shape.dim, got.data());
    for (const float value : got) EXPECT_TRUE(std::isfinite(value));
  }
}

TEST_P(PrepareQkvOnEachSimd, ARowDependsOnNoOther) {
  Case all({.dim = 40, .pairs = 20}), alone = all;
  backend_->Run(backend_->ops().PrepareQkv, all.Args());
  for (size_t row = 0; row < all.positions.size(); ++row) {
    PrepareQkvArgs args = alone.Args();
    for (View* view : {&args.qkv, &args.positions, &args.key, &args.value}) {
      view->data = view->row(row);
      view->shape[0] = 1;
    }
    backend_->Run(backend_->ops().PrepareQkv, args);
  }
  EXPECT_EQ(alone.qkv, all.qkv);
  EXPECT_EQ(alone.key, all.key);
  EXPECT_EQ(alone.value, all.value);
}

TEST_P(PrepareQkvOnEachSimd, StoresWhatStoreKvWould) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kQ8_0}) {
    for (int window : {0, 1, 16, 17, 40}) {
      SCOPED_TRACE(window);
      const int dim = IsQuantised(dtype) ? 64 : 33;
      Case got({.dim = dim, .pairs = 16, .cache = dtype}), want = got;
      const int rows = static_cast<int>(got.positions.size());
      CachePages stored(rows, dtype, got.shape.kv_heads, got.shape.dim, window, 131072);
      CachePages wanted = stored;
      Travel there(*backend_);
      PrepareQkvArgs args = got.Args();
      args.cache = stored.At(there);
      backend_->Run(backend_->ops().PrepareQkv, args);
      args = want.Args();
      backend_->Run(backend_->ops().PrepareQkv, args);
      const std::vector<int32_t> row_begin = {0, 1, 2, 3, 4, 5};
      backend_->Run(backend_->ops().StoreKv, {args.key,
                                              args.value,
                                              wanted.At(there),
                                              {rows, rows, row_begin.data(), want.positions.data()},
                                              window});
      EXPECT_TRUE(stored.arena == wanted.arena);
      EXPECT_EQ(got.qkv, want.qkv);
      EXPECT_TRUE(SameBytes(got.key, want.key));
      EXPECT_TRUE(SameBytes(got.value, want.value));
    }
  }
}

TEST(PrepareQkvDeathTest, RefusesOtherCacheTypes) {
  const auto backend = Backend::Cpu({.threads = 1});
  Case c({.cache = DType::kF16});
  EXPECT_DEATH(backend->Run(backend->ops().PrepareQkv, c.Args()), "F16");
}

TEST(PrepareQkvDeathTest, RefusesHeadsOfPartsOfBlocks) {
  const auto backend = Backend::Cpu({.threads = 1});
  Case c({.dim = 80, .pairs = 0, .cache = DType::kQ8_0});
  EXPECT_DEATH(backend->Run(backend->ops().PrepareQkv, c.Args()), "16 vs 0");
}

TEST(Cost, OfPrepareQkvCountsWhatIsTouched) {
  Case c({.heads = 4, .kv_heads = 2, .dim = 12, .pairs = 4, .norm = true, .cache = DType::kBF16});
  const int64_t rows = c.positions.size(), q = rows * 4 * 12, k = rows * 2 * 12;
  PrepareQkvArgs args = c.Args();
  EXPECT_EQ(Cost(args).bytes, 4 * (2 * q + 2 * k) + 2 * 2 * k + 4 * (2 * 12 + rows + 4));
  EXPECT_EQ(Cost(args).flops, 4 * (q + k) + 6 * rows * 6 * 4 + 2 * k);
  std::byte somewhere;
  args.cache.arena = &somewhere;
  EXPECT_EQ(Cost(args).bytes, 4 * (2 * q + 2 * k) + 2 * 2 * 2 * k + 4 * (2 * 12 + rows + 4));
  args.cache.arena = nullptr;
  args.query_norm = args.key_norm = args.frequencies = View();
  EXPECT_EQ(Cost(args).bytes, 4 * 2 * k + 2 * 2 * k);
  EXPECT_EQ(Cost(args).flops, 2 * k);
}

}  // namespace
}  // namespace longspan
