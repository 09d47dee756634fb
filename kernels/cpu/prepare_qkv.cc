#include <cstring>

#include "kernels/check.h"
#include "kernels/convert.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/norm.h"
#include "kernels/cpu/ops_cpu.h"
#include "kernels/cpu/store_kv.h"

namespace longspan::cpu {
namespace {

// cos and sin of position * frequency. The product is rounded to float, as the reference models do
// it; the angle is then reduced by pi/2 in double, so that large positions keep their accuracy.
LONGSPAN_INLINE void Angles(float position, const float* frequencies, int64_t count,
                            float magnitude, float* cosines, float* sines) {
  for (int64_t i = 0; i < count; ++i) {
    const float product = position * frequencies[i];
    const double angle = product;
    const double turns = angle * 0.63661977236758134308;  // 2 / pi
    const auto quadrant = static_cast<int32_t>(turns + (turns < 0 ? -0.5 : 0.5));
    const double n = quadrant;
    const double r = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
    const double r2 = r * r;
    // Taylor series on [-pi/4, pi/4], below 1e-12.
    const double sine =
        r * (1 + r2 * (-1.0 / 6 +
                       r2 * (1.0 / 120 +
                             r2 * (-1.0 / 5040 + r2 * (1.0 / 362880 + r2 * (-1.0 / 39916800))))));
    const double cosine =
        1 + r2 * (-1.0 / 2 +
                  r2 * (1.0 / 24 +
                        r2 * (-1.0 / 720 + r2 * (1.0 / 40320 +
                                                 r2 * (-1.0 / 3628800 + r2 * (1.0 / 479001600))))));
    const bool swap = (quadrant & 1) != 0;
    const double c = swap ? sine : cosine;
    const double s = swap ? cosine : sine;
    cosines[i] = static_cast<float>(((quadrant + 1) & 2) != 0 ? -c : c) * magnitude;
    sines[i] = static_cast<float>((quadrant & 2) != 0 ? -s : s) * magnitude;
  }
}

LONGSPAN_INLINE void RotateHalves(float* x, const float* cosines, const float* sines,
                                  int64_t pairs) {
  float* y = x + pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[i], b = y[i];
    x[i] = a * cosines[i] - b * sines[i];
    y[i] = b * cosines[i] + a * sines[i];
  }
}

LONGSPAN_INLINE void RotatePairs(float* x, const float* cosines, const float* sines,
                                 int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosines[i] - b * sines[i];
    x[2 * i + 1] = b * cosines[i] + a * sines[i];
  }
}

// The first `heads` heads of row x, turned by its position; angles: room for two numbers a pair.
LONGSPAN_INLINE void RotateRow(const PrepareQkvArgs& a, int32_t position, int64_t heads, float* x,
                               float* angles) {
  const int64_t pairs = a.frequencies.shape[0];
  float* cosines = angles;
  float* sines = angles + pairs;
  Angles(static_cast<float>(position), a.frequencies.as<float>(), pairs, a.magnitude, cosines,
         sines);
  for (int64_t h = 0; h < heads; ++h, x += a.key.shape[2]) {
    if (a.interleaved) {
      RotatePairs(x, cosines, sines, pairs);
    } else {
      RotateHalves(x, cosines, sines, pairs);
    }
  }
}

LONGSPAN_LANES void RotateRowLanes(const PrepareQkvArgs& a, int32_t position, int64_t heads,
                                   float* x, float* angles) {
  RotateRow(a, position, heads, x, angles);
}
void RotateRowPortable(const PrepareQkvArgs& a, int32_t position, int64_t heads, float* x,
                       float* angles) {
  RotateRow(a, position, heads, x, angles);
}

// Heads of `dim` numbers, side by side, to `to`'s type, a plain one: row `row` of [rows, heads,
// dim].
LONGSPAN_INLINE void StoreHeads(const float* x, const View& to, int64_t row) {
  const int64_t dim = to.shape[2];
  for (int64_t h = 0; h < to.shape[1]; ++h, x += dim) {
    std::byte* out = to.row(row) + BytesOf(to.dtype, h * to.stride[1]);
    if (to.dtype == DType::kF32) {
      std::memcpy(out, x, sizeof(float) * dim);
    } else {
      auto* half = reinterpret_cast<uint16_t*>(out);
      for (int64_t d = 0; d < dim; ++d) half[d] = ToBf16(x[d]);
    }
  }
}

LONGSPAN_LANES void StoreHeadsLanes(const float* x, const View& to, int64_t row) {
  StoreHeads(x, to, row);
}
void StoreHeadsPortable(const float* x, const View& to, int64_t row) { StoreHeads(x, to, row); }

// The same to Q8_0, in the levels that products take their activations in.
void StoreBlocks(const MatMulKernels& kernels, const float* x, const View& to, int64_t row) {
  for (int64_t h = 0; h < to.shape[1]; ++h) {
    auto* block = reinterpret_cast<BlockQ8_0*>(to.row(row) + BytesOf(to.dtype, h * to.stride[1]));
    for (int64_t d = 0; d < to.shape[2]; d += 32, x += 32, ++block) {
      float scale, sum16[2], sum32, scaled_sum;
      int32_t begin16[2], begin32;
      kernels.quantise(x, 32, {block->q, &scale, sum16, &sum32, &scaled_sum, begin16, &begin32});
      block->d = ToF16(scale);
    }
  }
}

}  // namespace

void PrepareQkv(BackendContext& context, const PrepareQkvArgs& a) {
  for (const View* to : {&a.key, &a.value}) {
    CHECK(to->dtype == DType::kF32 || to->dtype == DType::kBF16 || to->dtype == DType::kQ8_0)
        << Info(to->dtype).name;
    CHECK_EQ(to->shape[2] % Info(to->dtype).block_elements, 0);
    CHECK(a.cache.arena == nullptr || to->dtype == a.cache.dtype) << Info(to->dtype).name;
  }
  const bool portable = context.simd == Simd::kPortable;
  const NormRowFunction norm = NormRowOf(context.simd);
  const auto rotate = portable ? RotateRowPortable : RotateRowLanes;
  const auto store_plain = portable ? StoreHeadsPortable : StoreHeadsLanes;
  const auto store = [&](const float* x, const View& to, int64_t row) {
    if (IsQuantised(to.dtype)) return StoreBlocks(SetOf(context.simd).matmul, x, to, row);
    store_plain(x, to, row);
  };
  const int64_t dim = a.key.shape[2], heads = a.query_heads(), kv_heads = a.key.shape[1];
  const auto norm_heads = [&](float* x, int64_t count, const View& weight) {
    if (weight.empty()) return;
    for (int64_t h = 0; h < count; ++h, x += dim) norm(x, weight.as<float>(), dim, a.eps, x);
  };
  const int64_t grain = 1 + 8192 / a.qkv.shape[1];
  context.team.For(a.qkv.shape[0], grain, [&](int64_t begin, int64_t end, int thread) {
    const size_t bytes = 2 * sizeof(float) * a.frequencies.elements();
    auto* angles = reinterpret_cast<float*>(context.Scratch(thread, bytes));
    for (int64_t row = begin; row < end; ++row) {
      float* query = a.qkv.as<float>() + row * a.qkv.stride[0];
      float* key = query + heads * dim;
      norm_heads(query, heads, a.query_norm);
      norm_heads(key, kv_heads, a.key_norm);
      if (!a.frequencies.empty()) {
        rotate(a, a.positions.as<int32_t>()[row], heads + kv_heads, query, angles);
      }
      store(key, a.key, row);
      store(key + kv_heads * dim, a.value, row);
      if (a.cache.arena == nullptr) continue;
      StoreRow(a.key, a.value, row, a.cache, static_cast<int>(row), a.positions.as<int32_t>()[row]);
    }
  });
}

}  // namespace longspan::cpu
