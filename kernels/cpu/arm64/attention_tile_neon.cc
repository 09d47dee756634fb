// The tile functions on four lanes.
#include <arm_neon.h>

#include <algorithm>
#include <cstring>

#include "kernels/cpu/arm64/sets.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/target.h"

#define LONGSPAN_TARGET

namespace longspan::cpu {
namespace {

constexpr int kWide = 4;

LONGSPAN_INLINE void LoadBlocks(const BlockQ8_0* blocks, int dim, float* to) {
  for (int b = 0; b < dim / 32; ++b) {
    const float scale = HalfToFloat(blocks[b].d);
    for (int i = 0; i < 32; i += 8, to += 8) {
      const int16x8_t q = vmovl_s8(vld1_s8(blocks[b].q + i));
      vst1q_f32(to, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(q))), scale));
      vst1q_f32(to + 4, vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(q))), scale));
    }
  }
}

void Load(DType dtype, const std::byte* from, int64_t stride, int rows, int dim, int padded,
          float* to) {
  for (int row = 0; row < rows; ++row, from += stride, to += padded) {
    if (dtype == DType::kF32) {
      std::memcpy(to, from, sizeof(float) * dim);
    } else if (dtype == DType::kQ8_0) {
      LoadBlocks(reinterpret_cast<const BlockQ8_0*>(from), dim, to);
    } else {
      const auto* bytes = reinterpret_cast<const uint8_t*>(from);
      int d = 0;
      for (; d + kWide <= dim; d += kWide) {
        const uint16x4_t halves = vreinterpret_u16_u8(vld1_u8(bytes + 2 * d));
        vst1q_f32(to + d, vreinterpretq_f32_u32(vshll_n_u16(halves, 16)));
      }
      for (; d < dim; ++d) {
        const uint32_t bits = static_cast<uint32_t>(bytes[2 * d] | bytes[2 * d + 1] << 8) << 16;
        std::memcpy(to + d, &bits, sizeof(bits));
      }
    }
    std::fill(to + dim, to + padded, 0.0f);
  }
}

// kQ queries against 16 / kQ keys.
template <int kQ>
LONGSPAN_INLINE void ScoreTile(const float* queries, const float* keys, int padded, float* scores) {
  constexpr int kK = 16 / kQ;
  float32x4_t sums[16];
  LONGSPAN_UNROLL
  for (int i = 0; i < 16; ++i) sums[i] = vdupq_n_f32(0);
  for (int d = 0; d < padded; d += kWide) {
    float32x4_t query[kQ];
    LONGSPAN_UNROLL
    for (int q = 0; q < kQ; ++q) query[q] = vld1q_f32(queries + q * padded + d);
    LONGSPAN_UNROLL
    for (int k = 0; k < kK; ++k) {
      const float32x4_t key = vld1q_f32(keys + k * padded + d);
      LONGSPAN_UNROLL
      for (int q = 0; q < kQ; ++q) sums[q * kK + k] = vfmaq_f32(sums[q * kK + k], query[q], key);
    }
  }
  // Each sum over its lanes as (l0 + l1) + (l2 + l3).
  LONGSPAN_UNROLL
  for (int i = 0; i < 16; i += 4) {
    vst1q_f32(scores + i / kK * kBlockKeys + i % kK,
              vpaddq_f32(vpaddq_f32(sums[i], sums[i + 1]), vpaddq_f32(sums[i + 2], sums[i + 3])));
  }
}

// e^x for x <= 0 with a relative error below 2e-7, as Exp() in lanes.h; 0 below -87.
LONGSPAN_INLINE float32x4_t ExpOf(float32x4_t x) {
  const float32x4_t low = vdupq_n_f32(-87);
  const uint32x4_t in_range = vcgeq_f32(x, low);
  x = vmaxq_f32(x, low);
  const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504088896341f));
  const float32x4_t r = vfmaq_n_f32(vfmsq_n_f32(x, n, 0.693359375f), n, 2.12194440e-4f);
  float32x4_t p = vdupq_n_f32(1.9875691500e-4f);
  for (float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = vfmaq_f32(vdupq_n_f32(c), p, r);
  }
  const float32x4_t e = vaddq_f32(vfmaq_f32(r, p, vmulq_f32(r, r)), vdupq_n_f32(1));
  const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
  const float32x4_t scaled = vmulq_f32(e, vreinterpretq_f32_s32(power));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(scaled), in_range));
}

void Softmax(float* scores, float previous_max, float* max, float* sum) {
  float32x4_t tops = vdupq_n_f32(previous_max);
  for (int k = 0; k < kBlockKeys; k += kWide) tops = vmaxq_f32(tops, vld1q_f32(scores + k));
  *max = vmaxvq_f32(tops);
  const float32x4_t highest = vdupq_n_f32(*max);
  float32x4_t total = vdupq_n_f32(0);
  for (int k = 0; k < kBlockKeys; k += kWide) {
    const float32x4_t p = ExpOf(vsubq_f32(vld1q_f32(scores + k), highest));
    vst1q_f32(scores + k, p);
    total = vaddq_f32(total, p);
  }
  *sum = vaddvq_f32(total);
}

// kQ queries, kC * 4 channels.
template <int kQ, int kC>
LONGSPAN_INLINE void AccumulateTile(const float* p, const float* values, int begin, int end,
                                    int padded, const float* rescale, float* out) {
  float32x4_t sums[kQ][kC];
  LONGSPAN_UNROLL
  for (int q = 0; q < kQ; ++q) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) {
      sums[q][c] = vmulq_n_f32(vld1q_f32(out + q * padded + c * kWide), rescale[q]);
    }
  }
  for (int k = begin; k < end; ++k) {
    float32x4_t value[kC];
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) value[c] = vld1q_f32(values + k * padded + c * kWide);
    LONGSPAN_UNROLL
    for (int q = 0; q < kQ; ++q) {
      const float weight = p[q * kBlockKeys + k];
      LONGSPAN_UNROLL
      for (int c = 0; c < kC; ++c) sums[q][c] = vfmaq_n_f32(sums[q][c], value[c], weight);
    }
  }
  LONGSPAN_UNROLL
  for (int q = 0; q < kQ; ++q) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) vst1q_f32(out + q * padded + c * kWide, sums[q][c]);
  }
}

}  // namespace
}  // namespace longspan::cpu

#include "kernels/cpu/attention_rows.inl"

namespace longspan::cpu {

const AttentionTile kNeonAttentionTile = {kWide, Load, Scores, Softmax, Accumulate};

}  // namespace longspan::cpu
