// MatMul's inner loops in the NEON of every 64-bit Arm processor. Packing stays portable.
#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "kernels/cpu/arm64/sets.h"
#include "kernels/cpu/float_tiles.h"
#include "kernels/cpu/panels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/target.h"

#define LONGSPAN_TARGET

namespace longspan::cpu {
namespace {

// Steps whose products (of a level below 2^(bits - 1), or 2^bits without offset, and at most 127) a
// signed 16-bit sum holds.
template <int kBits>
constexpr int kStepsPerSum = kBits == 8 ? 2 : 4;
static_assert(128 * 127 * 2 < 32768 && 32 * 127 * 4 < 32768);

// Adds the products of four steps' levels and the 16 numbers at q, of R rows `stride` apart.
template <int kBits, int R, int V>
LONGSPAN_INLINE void AddSteps(const int8_t* levels, const int8_t* q, int64_t stride,
                              int32x4_t (&dot)[R][V]) {
  constexpr int kSteps = kStepsPerSum<kBits>;
  LONGSPAN_UNROLL
  for (int first = 0; first < 4; first += kSteps) {
    LONGSPAN_UNROLL
    for (int v = 0; v < V; ++v) {
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        int16x8_t low = vdupq_n_s16(0), high = low;  // of two outputs each
        LONGSPAN_UNROLL
        for (int s = first; s < first + kSteps; ++s) {
          int32_t word;
          std::memcpy(&word, q + r * stride + 4 * s, 4);
          const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(word));
          const int8x16_t w = vld1q_s8(levels + kStepBytes * s + 16 * v);
          low = vmlal_s8(low, vget_low_s8(w), vget_low_s8(x));
          high = vmlal_high_s8(high, w, x);
        }
        const int32x4_t sums = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
        dot[r][v] = vaddq_s32(dot[r][v], sums);
      }
    }
  }
}

}  // namespace
}  // namespace longspan::cpu

#include "kernels/cpu/arm64/blocks_neon.inl"

namespace longspan::cpu {
namespace {

void Quantise(const float* x, int64_t in, const QuantisedRows& row) {
  for (int64_t g = 0; g < in / kActivationGroup; ++g, x += kActivationGroup) {
    float32x4_t v[8];
    uint32x4_t largest = vdupq_n_u32(0);  // as bits: NaN is the largest of all
    LONGSPAN_UNROLL
    for (int i = 0; i < 8; ++i) {
      v[i] = vld1q_f32(x + 4 * i);
      largest = vmaxq_u32(largest, vreinterpretq_u32_f32(vabsq_f32(v[i])));
    }
    const float amax = std::bit_cast<float>(vmaxvq_u32(largest));
    const bool zero = amax < kSmallestActivation;
    const float inverse = zero ? 0 : 127 / amax;
    int16x4_t q[8];
    LONGSPAN_UNROLL
    for (int i = 0; i < 8; ++i) {
      const float32x4_t scaled = vmulq_n_f32(v[i], inverse);
      // What has no integer becomes 0, as in the portable loop.
      const uint32x4_t fits = vcaleq_f32(scaled, vdupq_n_f32(127.5f));
      q[i] = vmovn_s32(vandq_s32(vcvtnq_s32_f32(scaled), vreinterpretq_s32_u32(fits)));
    }
    int sum[2];
    LONGSPAN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int16x4_t* four = q + 4 * half;
      const int8x16_t bytes = vcombine_s8(vmovn_s16(vcombine_s16(four[0], four[1])),
                                          vmovn_s16(vcombine_s16(four[2], four[3])));
      vst1q_s8(row.q + kActivationGroup * g + 16 * half, bytes);
      sum[half] = vaddlvq_s8(bytes);
    }
    const float scale = zero ? 0 : amax / 127;
    row.scale[g] = scale;
    row.sum16[2 * g] = static_cast<float>(sum[0]);
    row.sum16[2 * g + 1] = static_cast<float>(sum[1]);
    row.sum32[g] = static_cast<float>(sum[0] + sum[1]);
    row.scaled_sum[g] = scale * static_cast<float>(sum[0] + sum[1]);
  }
}

template <DType kType>
LONGSPAN_INLINE float32x4_t LoadWeights(const std::byte* p) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(p);
  if constexpr (kType == DType::kF32) {
    return vreinterpretq_f32_u8(vld1q_u8(bytes));
  } else if constexpr (kType == DType::kF16) {
    return Halves(bytes);
  } else {
    return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(bytes)), 16));
  }
}

// The sums of R rows and C outputs, each ((l0 + l1) + (l2 + l3)); outputs beyond t.columns are
// dropped.
template <int R, int C>
LONGSPAN_INLINE void StoreSums(const FloatTile& t, int64_t row, int64_t column,
                               const float32x4_t (&sum)[R][C]) {
  LONGSPAN_UNROLL
  for (int c = 0; c < C; c += 4) {
    const int64_t valid = std::min<int64_t>(t.columns - column - c, 4);
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      float* out = t.out + (row + r) * t.out_stride + column + c;
      const float32x4_t sums = vpaddq_f32(vpaddq_f32(sum[r][c], sum[r][c + 1]),
                                          vpaddq_f32(sum[r][c + 2], sum[r][c + 3]));
      if (valid == 4) {
        vst1q_f32(out, sums);
      } else {
        for (int64_t i = 0; i < valid; ++i) out[i] = sums[i];
      }
    }
  }
}

// R rows times C outputs; those beyond t.columns are dropped.
template <DType kType, int R, int C>
LONGSPAN_INLINE void MultiplyFloatTile(const FloatTile& t, int64_t row, int64_t column) {
  constexpr int kBytes = Info(kType).block_bytes;
  const std::byte* w[C];
  FindWeights(t, column, w);
  const float* x[R];
  float32x4_t sum[R][C];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    x[r] = t.x + (row + r) * t.x_stride;
    LONGSPAN_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = vdupq_n_f32(0);
  }
  const bool cold = t.cold && row == 0;
  const std::byte* next = FloatsAhead(w[0], C * t.weight_stride);
  for (int64_t i = 0; i < t.in; i += 4) {
    if (cold) Prefetch<4 * kBytes * C>(next + i * kBytes * C);
    float32x4_t weights[C];
    LONGSPAN_UNROLL
    for (int c = 0; c < C; ++c) weights[c] = LoadWeights<kType>(w[c] + i * kBytes);
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      const float32x4_t v = vld1q_f32(x[r] + i);
      LONGSPAN_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = vfmaq_f32(sum[r][c], v, weights[c]);
    }
  }
  StoreSums<R, C>(t, row, column, sum);
}

template <DType kType>
struct FloatRows {
  template <int R, int C>
  static void Multiply(const FloatTile& t, int64_t row, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += C) MultiplyFloatTile<kType, R, C>(t, row, c);
  }
};

template <DType kType>
void MultiplyFloat(const FloatTile& t) {
  MultiplyInTiles<FloatRows<kType>>(t);
}

template <DType kType>
void Widen(const std::byte* weights, int64_t count, float* out) {
  constexpr int kBytes = Info(kType).block_bytes;
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) vst1q_f32(out + i, LoadWeights<kType>(weights + i * kBytes));
  DequantiseRow(kType, weights + i * kBytes, count - i, out + i);
}

template <DType kType>
constexpr FloatKernels FloatEntry() {
  return {MultiplyFloat<kType>, Widen<kType>};
}

}  // namespace

MatMulKernels NeonMatMul(MatMulKernels kernels) {
  kernels = WithBlocks(kernels);
  kernels.f32 = FloatEntry<DType::kF32>();
  kernels.f16 = FloatEntry<DType::kF16>();
  kernels.bf16 = FloatEntry<DType::kBF16>();
  kernels.quantise = Quantise;
  kernels.float_columns = kFloatTileColumns;
  return kernels;
}

}  // namespace longspan::cpu
