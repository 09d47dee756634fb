// The ops around the matrix products on the GPU: each against its CPU twin, on shapes of models and
// on odd ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"
#include "tests/support/cache_pages.h"
#include "tests/support/gpu_beside_cpu.h"
#include "tests/support/travel.h"

namespace longspan {
namespace {

using testing::CachePages;
using testing::Travel;

constexpr float kEps = 1e-5f;
// Sums of `terms` squares, in eight lanes on the CPU and in another order here, whose roundings are
// random in sign; then up to ten roundings of numbers that are below 8.
double Tolerance(int terms) { return 8 * (10 + std::sqrt(terms / 8.0)) * 0x1p-24; }

std::vector<float> Normal(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

std::vector<float> Weights(size_t count, uint32_t seed) {
  std::vector<float> values = Normal(count, seed);
  for (float& x : values) x = 1 + std::tanh(x) / 2;
  return values;
}

std::vector<uint16_t> Rounded(const std::vector<float>& values) {
  std::vector<uint16_t> rounded(values.size());
  std::transform(values.begin(), values.end(), rounded.begin(), ToBf16);
  return rounded;
}

// What a vector of an op's out holds: floats or bf16.
template <class T>
constexpr DType kTypeOf = std::is_same_v<T, float> ? DType::kF32 : DType::kBF16;

void ExpectNear(const std::vector<float>& got, const std::vector<float>& want, double absolute,
                double relative = 0) {
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_NEAR(got[i], want[i], absolute + relative * std::fabs(want[i])) << "element " << i;
  }
}

class CudaFused : public testing::GpuBesideCpu {};

// Rows of `dim` numbers, `gap` apart from the next.
struct NormCase {
  NormCase(int rows, int dim, int gap, bool post_norm, bool next_norm)
      : rows(rows), dim(dim), gap(gap), post_norm(post_norm), next_norm(next_norm) {
    const size_t size = static_cast<size_t>(rows) * (dim + gap);
    x = Normal(size, 1);
    residual = Normal(size, 2);
    for (int d = 0; d < dim; ++d) x[d] *= 1e-3f, residual[d] *= 1e-3f;  // eps counts in row 0
    out.assign(size, 77.0f);
    x_weight = Weights(dim, 3);
    weight = Weights(dim, 4);
  }

  void Run(Backend& backend, int first, int count) { RunInto(out, backend, first, count); }

  template <class T>
  void RunInto(std::vector<T>& to, Backend& backend, int first, int count) {
    Travel there(backend);
    const auto rows_of = [&](auto& v) {
      constexpr DType kType = kTypeOf<std::remove_reference_t<decltype(v[0])>>;
      View view = View::Matrix(there(v), kType, rows, dim + gap).Columns(0, dim);
      view.data = view.row(first);
      return view.Rows(count);
    };
    const auto vector = [&](std::vector<float>& v, bool given) {
      return given ? View::Vector(there(v), DType::kF32, dim) : View();
    };
    AddRmsNormArgs args;
    args.x = rows_of(x);
    args.x_weight = vector(x_weight, post_norm);
    args.residual = rows_of(residual);
    args.weight = vector(weight, next_norm);
    args.out = rows_of(to);
    args.eps = kEps;
    backend.Run(backend.ops().AddRmsNorm, args);
    there.Home();
  }

  int rows, dim, gap;
  bool post_norm, next_norm;
  std::vector<float> x, residual, out, x_weight, weight;
};

TEST_F(CudaFused, AddRmsNormEqualsTheCpus) {
  // Held in registers in two forms, and streamed: too long, or of no whole vectors.
  for (int dim : {4, 128, 384, 640, 2560, 5376, 8192, 8196, 16384, 16388, 1, 37, 2561}) {
    for (int rows : {1, 7, 64}) {
      for (int gap : {0, 4, 1}) {
        SCOPED_TRACE(std::to_string(dim) + " of " + std::to_string(rows) + " rows, gap " +
                     std::to_string(gap));
        for (int norms = 0; norms < 4; ++norms) {
          NormCase want(rows, dim, gap, norms % 2 == 1, norms >= 2), got = want;
          want.Run(*cpu_, 0, rows);
          got.Run(*gpu_, 0, rows);
          ExpectNear(got.residual, want.residual, Tolerance(dim));
          ExpectNear(got.out, want.out, Tolerance(dim));
          EXPECT_EQ(got.x, want.x);
        }
      }
    }
  }
}

TEST_F(CudaFused, ARowOfAddRmsNormDependsOnNoOther) {
  for (int dim : {640, 2560, 12000, 1001}) {
    NormCase all(64, dim, 0, true, true), alone = all;
    all.Run(*gpu_, 0, 64);
    for (int row : {0, 1, 33, 63}) {
      alone.Run(*gpu_, row, 1);
      for (int i = row * dim; i < (row + 1) * dim; ++i) {
        ASSERT_EQ(alone.residual[i], all.residual[i]) << dim;
        ASSERT_EQ(alone.out[i], all.out[i]) << dim;
      }
    }
  }
}

TEST_F(CudaFused, ABf16OutOfAddRmsNormIsTheF32OneRounded) {
  for (int dim : {4, 384, 2560, 8196, 16388, 37}) {
    for (int gap : {0, 4, 1}) {
      NormCase single(7, dim, gap, true, true), half = single;
      std::vector<uint16_t> out = Rounded(half.out);
      single.Run(*gpu_, 0, 7);
      half.RunInto(out, *gpu_, 0, 7);
      EXPECT_EQ(out, Rounded(single.out)) << dim << ", gap " << gap;
      EXPECT_EQ(half.residual, single.residual) << dim << ", gap " << gap;
    }
  }
}

template <class T>
std::vector<T> Normed(Backend& backend, std::vector<float> x, int dim) {
  std::vector<float> weight = Weights(dim, 6);
  std::vector<T> out(x.size());
  const int rows = static_cast<int>(x.size()) / dim;
  Travel there(backend);
  backend.Run(backend.ops().RmsNorm, {View::Matrix(there(x), DType::kF32, rows, dim),
                                      View::Vector(there(weight), DType::kF32, dim),
                                      View::Matrix(there(out), kTypeOf<T>, rows, dim), kEps});
  there.Home();
  return out;
}

TEST_F(CudaFused, RmsNormEqualsTheCpusInPlaceToo) {
  for (int dim : {384, 2560, 5376, 9000, 20000, 37}) {
    SCOPED_TRACE(dim);
    std::vector<float> x = Normal(3 * dim, 5), weight = Weights(dim, 6);
    const std::vector<float> out = Normed<float>(*gpu_, x, dim);
    ExpectNear(out, Normed<float>(*cpu_, x, dim), Tolerance(dim));
    EXPECT_EQ(Normed<uint16_t>(*gpu_, x, dim), Rounded(out));
    Travel there(*gpu_);
    const View rows = View::Matrix(there(x), DType::kF32, 3, dim);
    gpu_->Run(gpu_->ops().RmsNorm,
              {rows, View::Vector(there(weight), DType::kF32, dim), rows, kEps});
    there.Home();
    EXPECT_EQ(x, out);
  }
}

struct QkvShape {
  int heads, kv_heads, dim, pairs;
  bool norm = true, interleaved = false;
  DType cache = DType::kBF16;
  float magnitude = 1;
  int gap = 0;  // between rows
};

struct QkvCase {
  QkvCase(const QkvShape& s, int rows) : shape(s), rows(rows) {
    qkv = Normal(static_cast<size_t>(rows) * (Columns() + s.gap), s.dim);
    query_norm = Weights(s.dim, 1);
    key_norm = Weights(s.dim, 2);
    for (int i = 0; i < s.pairs; ++i) {
      frequencies.push_back(std::pow(1e4f, -static_cast<float>(i) / s.pairs));
    }
    for (int i = 0; i < rows; ++i) positions.push_back(i % 5 == 4 ? 131071 - i : 37 * i);
    key.assign(static_cast<size_t>(rows) * (KvColumns() + s.gap), 77.0f);
    value = key;
    half_key.assign(key.size(), 77);
    half_value = half_key;
  }
  int Columns() const { return (shape.heads + 2 * shape.kv_heads) * shape.dim; }
  int KvColumns() const { return shape.kv_heads * shape.dim; }

  enum class Store { kNone, kWithin, kAfter };
  // Rows into the caches as well where these are given, each a sequence's: by PrepareQkv itself, or
  // by StoreKv after it.
  void Run(Backend& backend, int first, int count, Store store = Store::kNone,
           CachePages* pages = nullptr, int window = 0) {
    Travel there(backend);
    const auto rows_of = [&](void* data, DType dtype, int columns) {
      View view = View::Matrix(data, dtype, rows, columns + shape.gap).Columns(0, columns);
      view.data = view.row(first);
      return view.Rows(count);
    };
    const bool half = shape.cache == DType::kBF16;
    const auto kv = [&](std::vector<float>& single, std::vector<uint16_t>& brain) {
      void* data = half ? static_cast<void*>(there(brain)) : there(single);
      return rows_of(data, shape.cache, KvColumns()).Heads(shape.kv_heads);
    };
    PrepareQkvArgs args;
    args.qkv = rows_of(there(qkv), DType::kF32, Columns());
    if (shape.norm) {
      args.query_norm = View::Vector(there(query_norm), DType::kF32, shape.dim);
      args.key_norm = View::Vector(there(key_norm), DType::kF32, shape.dim);
    }
    args.positions = View::Vector(there(positions) + first, DType::kI32, count);
    if (shape.pairs > 0) {
      args.frequencies = View::Vector(there(frequencies), DType::kF32, shape.pairs);
    }
    args.key = kv(key, half_key);
    args.value = kv(value, half_value);
    args.interleaved = shape.interleaved;
    args.magnitude = shape.magnitude;
    args.eps = kEps;
    if (store == Store::kWithin) args.cache = pages->At(there);
    backend.Run(backend.ops().PrepareQkv, args);
    std::vector<int32_t> row_begin(count + 1);
    std::iota(row_begin.begin(), row_begin.end(), 0);
    if (store == Store::kAfter) {
      const RaggedBatch batch = {count,
                                 count,
                                 there(row_begin),
                                 args.positions.as<const int32_t>(),
                                 row_begin.data(),
                                 &positions[first]};
      backend.Run(backend.ops().StoreKv, {args.key, args.value, pages->At(there), batch, window});
    }
    there.Home();
    if (half) {
      for (size_t i = 0; i < key.size(); ++i) key[i] = FromBf16(half_key[i]);
      for (size_t i = 0; i < value.size(); ++i) value[i] = FromBf16(half_value[i]);
    }
  }

  // qkv without its keys, which are lost.
  std::vector<float> Queries() const {
    std::vector<float> queries = qkv;
    for (int row = 0; row < rows; ++row) {
      const auto keys = queries.begin() + row * (Columns() + shape.gap) + shape.heads * shape.dim;
      std::fill(keys, keys + KvColumns(), 0.0f);
    }
    return queries;
  }

  QkvShape shape;
  int rows;
  std::vector<float> qkv, query_norm, key_norm, frequencies, key, value;
  std::vector<uint16_t> half_key, half_value;
  std::vector<int32_t> positions;
};

// Models: Gemma 3 of 270M and 27B, Qwen3 of 8B, Phi 3; then partial and odd heads, without norms or
// positions, and gaps.
const QkvShape kQkvShapes[] = {
    {4, 1, 256, 128},
    {32, 16, 128, 64},
    {32, 8, 128, 64},
    {32, 32, 96, 48, false},
    {8, 2, 64, 32, true, true},
    {6, 2, 80, 20, true, false, DType::kF32, 1.25f, 4},
    {3, 3, 33, 16, true, true, DType::kBF16, 0.5f, 3},
    {5, 1, 2, 1, true, false, DType::kF32, 1, 1},
    {3, 1, 200, 7, false, true, DType::kF32},
    {4, 2, 96, 0, true},
    {4, 2, 128, 0, false},
    {1, 1, 1, 0, false, false, DType::kF32},
};

TEST_F(CudaFused, PrepareQkvEqualsTheCpus) {
  for (const QkvShape& shape : kQkvShapes) {
    for (int rows : {1, 5, 64}) {
      SCOPED_TRACE("heads " + std::to_string(shape.heads) + " of " + std::to_string(shape.dim) +
                   ", rows " + std::to_string(rows));
      QkvCase want(shape, rows), got = want;
      want.Run(*cpu_, 0, rows);
      got.Run(*gpu_, 0, rows);
      const double tolerance = Tolerance(shape.dim) * shape.magnitude;
      ExpectNear(got.Queries(), want.Queries(), tolerance);
      // Where the CPU's key lies half way between two of the cache's, this one may be the other.
      ExpectNear(got.key, want.key, tolerance, shape.cache == DType::kBF16 ? 0x1p-7 : 0);
      EXPECT_EQ(got.value, want.value);
    }
  }
}

TEST_F(CudaFused, ARowOfPrepareQkvDependsOnNoOther) {
  for (const QkvShape& shape : kQkvShapes) {
    QkvCase all(shape, 64), alone = all;
    all.Run(*gpu_, 0, 64);
    for (int row = 0; row < 64; ++row) alone.Run(*gpu_, row, 1);
    EXPECT_EQ(alone.key, all.key);
    EXPECT_EQ(alone.value, all.value);
    EXPECT_EQ(alone.Queries(), all.Queries());
  }
}

TEST_F(CudaFused, PrepareQkvStoresWhatStoreKvWould) {
  for (QkvShape shape : kQkvShapes) {
    for (DType dtype : {DType::kBF16, DType::kF32}) {
      shape.cache = dtype;
      for (int rows : {1, 5, 33}) {
        for (int window : {0, 1, 16, 40}) {
          SCOPED_TRACE("heads " + std::to_string(shape.heads) + " of " + std::to_string(shape.dim) +
                       ", rows " + std::to_string(rows) + ", window " + std::to_string(window));
          QkvCase got(shape, rows), want = got;
          CachePages stored(rows, dtype, shape.kv_heads, shape.dim, window, 131072);
          CachePages wanted = stored;
          got.Run(*gpu_, 0, rows, QkvCase::Store::kWithin, &stored, window);
          want.Run(*gpu_, 0, rows, QkvCase::Store::kAfter, &wanted, window);
          EXPECT_TRUE(stored.arena == wanted.arena);
          EXPECT_EQ(got.key, want.key);
          EXPECT_EQ(got.value, want.value);
          EXPECT_EQ(got.Queries(), want.Queries());
        }
      }
    }
  }
}

// Sequences of `counts` rows each, at scattered positions of scattered pages: paged (window 0), or
// rings, in which some wrap.
std::vector<uint8_t> Stored(Backend& backend, const std::vector<int>& counts, DType dtype,
                            int kv_heads, int dim, int window) {
  const int sequences = static_cast<int>(counts.size());
  std::vector<int32_t> row_begin = {0}, start;
  for (int s = 0; s < sequences; ++s) {
    row_begin.push_back(row_begin.back() + counts[s]);
    start.push_back(7 * s % 40);
  }
  const int rows = row_begin.back(), columns = kv_heads * dim;
  CachePages pages(sequences, dtype, kv_heads, dim, window, 80);
  std::vector<uint8_t> key(BytesOf(dtype, int64_t{rows} * columns));
  std::mt19937 random(dim);
  for (uint8_t& byte : key) byte = static_cast<uint8_t>(random());
  std::vector<uint8_t> value(key.rbegin(), key.rend());

  Travel there(backend);
  StoreKvArgs args;
  args.key = View::Matrix(there(key), dtype, rows, columns).Heads(kv_heads);
  args.value = View::Matrix(there(value), dtype, rows, columns).Heads(kv_heads);
  args.cache = pages.At(there);
  args.batch = {sequences, rows, there(row_begin), there(start), row_begin.data(), start.data()};
  args.window = window;
  backend.Run(backend.ops().StoreKv, args);
  there.Home();
  return pages.arena;
}

TEST_F(CudaFused, StoreKvEqualsTheCpus) {
  std::vector<int> many(200, 1);  // more than a block has threads
  for (size_t s = 0; s < many.size(); s += 7) many[s] = static_cast<int>(s % 4);
  for (const std::vector<int>& counts :
       {std::vector<int>{1}, std::vector<int>(64, 1), many, std::vector<int>{0, 40, 0, 0, 3, 1}}) {
    for (DType dtype : {DType::kBF16, DType::kF32}) {
      for (int dim : {1, 33, 64, 80, 96, 128, 250, 256}) {
        for (int window : {0, 1, 16, 17, 64}) {
          EXPECT_EQ(Stored(*gpu_, counts, dtype, 2, dim, window),
                    Stored(*cpu_, counts, dtype, 2, dim, window))
              << counts.size() << " sequences, heads of " << dim << ", window " << window;
        }
      }
    }
  }
}

}  // namespace
}  // namespace longspan
