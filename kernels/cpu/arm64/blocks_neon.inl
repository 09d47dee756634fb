// Products of packed blocks, by AddSteps of the file that includes this and in the instructions
// that LONGSPAN_TARGET names. A panel is unpacked once for all rows, into signed levels: less their
// format's offset they fit eight bits, and no sum of x is needed.
#include <arm_neon.h>

#include <algorithm>

#include "kernels/cpu/matmul_kernels.h"
#include "kernels/cpu/prefetch.h"

namespace longspan::cpu {
namespace {

// Bytes [at, at + 16) of the levels of step `step` of a run, less the offset.
template <class Format>
LONGSPAN_TARGET LONGSPAN_INLINE int8x16_t UnpackLevels(const uint8_t* run, int step, int at) {
  const auto load = [&](int vector)
                        LONGSPAN_TARGET { return vld1q_u8(run + kStepBytes * vector + at); };
  uint8x16_t levels;
  if constexpr (Format::kBits == 8) {
    levels = load(step);
  } else {
    const uint8x16_t bytes = load(step / 2);
    levels = step % 2 == 0 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4);
    constexpr int kBits = Format::kBits - 4;
    if constexpr (kBits > 0) {
      constexpr int kFields = 8 / kBits;
      const int8x16_t up = vdupq_n_s8(static_cast<int8_t>(4 - kBits * (step % kFields)));
      const uint8x16_t high = vshlq_u8(load(4 + step / kFields), up);
      levels = vorrq_u8(levels, vandq_u8(high, vdupq_n_u8(kBits == 1 ? 16 : 48)));
    }
  }
  return vreinterpretq_s8_u8(vsubq_u8(levels, vdupq_n_u8(Format::kOffset)));
}

LONGSPAN_TARGET LONGSPAN_INLINE float32x4_t Halves(const uint8_t* d) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(d)));
}

LONGSPAN_TARGET LONGSPAN_INLINE float32x4_t ScalesOf(const uint8_t* bytes, bool is_signed,
                                                     float32x4_t d) {
  uint32_t word;
  std::memcpy(&word, bytes, 4);
  const uint8x8_t four = vreinterpret_u8_u32(vdup_n_u32(word));
  const int16x8_t wide =
      is_signed ? vmovl_s8(vreinterpret_s8_u8(four)) : vreinterpretq_s16_u16(vmovl_u8(four));
  return vmulq_f32(d, vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide))));
}

template <class Format>
LONGSPAN_TARGET void UnpackScales(const uint8_t* block, float* scales, float* mins) {
  using Packed = PackedPanel<Format>;
  for (int o = 0; o < kPanel; o += 4) {
    const float32x4_t d = Halves(block + 2 * o);
    for (int g = 0; g < Packed::kGroups; ++g) {
      float* to = scales + g * kPanel + o;
      if constexpr (Packed::kGroupBytes == 0) {
        vst1q_f32(to, d);
      } else if constexpr (Format::kMin) {
        const uint8_t* bytes = block + 2 * Packed::kHalves + g * Packed::kGroupBytes + o;
        vst1q_f32(to, ScalesOf(bytes, /*is_signed=*/false, d));
        vst1q_f32(mins + g * kPanel + o, ScalesOf(bytes + kPanel, /*is_signed=*/false,
                                                  Halves(block + Packed::kHalves + 2 * o)));
      } else {
        const uint8_t* bytes = block + Packed::kHalves + g * Packed::kGroupBytes + o;
        vst1q_f32(to, ScalesOf(bytes, /*is_signed=*/true, d));
      }
    }
  }
}

template <class Format>
LONGSPAN_TARGET void Unpack(const uint8_t* packed, int64_t in, const PanelMemory& memory) {
  using Packed = PackedPanel<Format>;
  for (int64_t b = 0; b < in / Packed::kElements; ++b) {
    const int64_t group = b * Packed::kGroups * kPanel;
    UnpackScales<Format>(packed + Packed::ScalesAt(in) + b * Packed::kScaleBytes,
                         memory.scales + group, memory.mins + group);
  }
  auto* levels = reinterpret_cast<int8_t*>(memory.levels);
  const uint8_t* ahead = packed + kAhead;
  for (int64_t run = 0; run < in / 32;
       ++run, packed += Packed::kRunBytes, ahead += Packed::kRunShare) {
    Prefetch<Packed::kRunShare>(ahead);
    LONGSPAN_UNROLL
    for (int s = 0; s < kRunSteps; ++s, levels += kStepBytes) {
      LONGSPAN_UNROLL
      for (int at = 0; at < kStepBytes; at += 16) {
        vst1q_s8(levels + at, UnpackLevels<Format>(packed, s, at));
      }
    }
  }
}

// R rows times V vectors of four outputs, from output `first` of an unpacked panel on.
template <class Format, int R, int V>
LONGSPAN_TARGET LONGSPAN_INLINE void MultiplyOutputs(const BlockTile& t, int64_t row, int first) {
  constexpr int kGroup = Format::kGroup;
  const int64_t scales_of_row = t.in / 32;
  const int8_t* q = t.x.q + row * t.in;
  const float* x_scale = t.x.scale + row * scales_of_row;
  const float* x_scaled_sum = t.x.scaled_sum + row * scales_of_row;
  const auto* levels = reinterpret_cast<const int8_t*>(t.scratch.levels) + 4 * first;
  float32x4_t result[R][V];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    LONGSPAN_UNROLL
    for (int v = 0; v < V; ++v) result[r][v] = vdupq_n_f32(0);
  }
  for (int64_t g = 0; g < t.in / kGroup; ++g) {
    int32x4_t dot[R][V];
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      LONGSPAN_UNROLL
      for (int v = 0; v < V; ++v) dot[r][v] = vdupq_n_s32(0);
    }
    for (int i = 0; i < kGroup; i += 16, q += 16, levels += 4 * kStepBytes) {
      AddSteps<Format::kBits, R, V>(levels, q, t.in, dot);
    }
    const int64_t x_group = g * kGroup / 32;
    LONGSPAN_UNROLL
    for (int v = 0; v < V; ++v) {
      const float32x4_t scale = vld1q_f32(t.scratch.scales + g * kPanel + first + 4 * v);
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const float32x4_t both = vmulq_n_f32(scale, x_scale[r * scales_of_row + x_group]);
        result[r][v] = vfmaq_f32(result[r][v], vcvtq_f32_s32(dot[r][v]), both);
      }
      if constexpr (Format::kMin) {
        const float32x4_t min = vld1q_f32(t.scratch.mins + g * kPanel + first + 4 * v);
        LONGSPAN_UNROLL
        for (int r = 0; r < R; ++r) {
          result[r][v] = vfmsq_n_f32(result[r][v], min, x_scaled_sum[r * scales_of_row + x_group]);
        }
      }
    }
  }
  const int64_t valid = std::min<int64_t>(t.columns - first, 4 * V);
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    float* out = t.out + (row + r) * t.out_stride + first;
    float values[4 * V];
    LONGSPAN_UNROLL
    for (int v = 0; v < V; ++v) vst1q_f32(values + 4 * v, result[r][v]);
    for (int64_t i = 0; i < valid; ++i) out[i] = values[i];
  }
}

// R * V dot products and as many results, a step's levels and R vectors of x fit 32 registers.
template <class Format, int R, int V>
LONGSPAN_TARGET void MultiplyRows(const BlockTile& t, int64_t row) {
  for (int first = 0; first < t.columns; first += 4 * V) {
    MultiplyOutputs<Format, R, V>(t, row, first);
  }
}

template <class Format>
LONGSPAN_TARGET void MultiplyBlocks(const BlockTile& t) {
  Unpack<Format>(t.panel, t.in, t.scratch);
  int64_t row = 0;
  for (; row + 4 <= t.rows; row += 4) MultiplyRows<Format, 4, 2>(t, row);
  for (; row + 2 <= t.rows; row += 2) MultiplyRows<Format, 2, 4>(t, row);
  if (row < t.rows) MultiplyRows<Format, 1, 4>(t, row);
}

MatMulKernels WithBlocks(MatMulKernels kernels) {
  kernels.q8_0.multiply = MultiplyBlocks<FormatQ8_0>;
  kernels.q4_0.multiply = MultiplyBlocks<FormatQ4_0>;
  kernels.q5_0.multiply = MultiplyBlocks<FormatQ5_0>;
  kernels.q4_k.multiply = MultiplyBlocks<FormatQ4_K>;
  kernels.q5_k.multiply = MultiplyBlocks<FormatQ5_K>;
  kernels.q6_k.multiply = MultiplyBlocks<FormatQ6_K>;
  return kernels;
}

}  // namespace
}  // namespace longspan::cpu
