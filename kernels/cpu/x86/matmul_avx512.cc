// MatMul's inner loops where AVX-512 with VNNI does better than AVX2. Packing and quantising stay.
#if !defined(__clang__)
// GCC bug 105593: gcc 12 takes the "undefined" operands inside its own AVX-512 headers for
// mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "kernels/cpu/matmul_kernels.h"
#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/x86/blocks_avx2.h"
#include "kernels/cpu/x86/float_tiles_avx512.h"
#include "kernels/cpu/x86/sets.h"

namespace longspan::cpu {
namespace {

// The levels of step `step` of a run.
template <class Format>
LONGSPAN_AVX512 inline __m512i UnpackLevels(const uint8_t* run, int step) {
  if (Format::kBits == 8) return _mm512_loadu_si512(run + kStepBytes * step);
  const __m512i bytes = _mm512_loadu_si512(run + kStepBytes * (step / 2));
  const __m512i nibbles =
      _mm512_and_si512(step % 2 == 0 ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
  constexpr int kBits = Format::kBits - 4;
  if (kBits == 0) return nibbles;
  const int fields = 8 / std::max(kBits, 1);
  const __m512i high = _mm512_loadu_si512(run + kStepBytes * (4 + step / fields));
  const int up = 4 - kBits * (step % fields);
  const __m512i moved = up >= 0 ? _mm512_slli_epi16(high, up) : _mm512_srli_epi16(high, -up);
  // nibbles | (moved & field)
  return _mm512_ternarylogic_epi32(nibbles, moved, _mm512_set1_epi8(kBits == 1 ? 16 : 48), 0xf8);
}

LONGSPAN_AVX512 inline __m512 Halves(const uint8_t* d) { return _mm512_cvtph_ps(Load256(d)); }

LONGSPAN_AVX512 inline __m128i Load128(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}

// Scales of one group of all outputs, from those of its block; as PackedPanel::Scale.
template <class Format>
LONGSPAN_AVX512 inline __m512 ScalesOf(const uint8_t* block, int group) {
  using Packed = PackedPanel<Format>;
  const __m512 d = Halves(block);
  if constexpr (Packed::kGroupBytes == 0) return d;
  const uint8_t* bytes =
      block + (Format::kMin ? 2 : 1) * Packed::kHalves + group * Packed::kGroupBytes;
  const __m512i wide =
      Format::kMin ? _mm512_cvtepu8_epi32(Load128(bytes)) : _mm512_cvtepi8_epi32(Load128(bytes));
  return _mm512_mul_ps(d, _mm512_cvtepi32_ps(wide));
}

template <class Format>
LONGSPAN_AVX512 inline __m512 MinsOf(const uint8_t* block, int group) {
  using Packed = PackedPanel<Format>;
  const uint8_t* bytes = block + 2 * Packed::kHalves + group * Packed::kGroupBytes + kPanel;
  return _mm512_mul_ps(Halves(block + Packed::kHalves),
                       _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(Load128(bytes))));
}

// Bytes from a row to the next, and three times as many.
struct Stride {
  explicit Stride(int64_t bytes) : once(bytes), thrice(3 * bytes) {}
  LONGSPAN_INLINE void Settle() { asm("" : "+r"(once), "+r"(thrice)); }
  int64_t once, thrice;
};

// What up to eight rows have at one place. Two addresses serve them all, and a stride that arrays
// share; the compiler, which Settle keeps from it, would have an address for each row and spill
// most of them.
template <class T>
struct Rows {
  Rows(const void* first, const Stride& stride)
      : near(static_cast<const std::byte*>(first)), far(near + 4 * stride.once) {}
  LONGSPAN_INLINE T At(const Stride& stride, int row, int i) const {
    const std::byte* four = row < 4 ? near : far;
    T value;
    std::memcpy(&value,
                four + (row % 4 == 3 ? stride.thrice : row % 4 * stride.once) + i * sizeof(T),
                sizeof(T));
    return value;
  }
  LONGSPAN_INLINE void Advance(int count) {
    near += count * sizeof(T);
    far += count * sizeof(T);
    asm("" : "+r"(near), "+r"(far));
  }
  const std::byte *near, *far;
};

// to[i] = -offset * sums[i], whole numbers all.
LONGSPAN_AVX512 inline void ScaleSums(const float* sums, int64_t count, int offset, int32_t* to) {
  const __m512 factor = _mm512_set1_ps(static_cast<float>(-offset));
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 valid =
        count - i >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count - i)) - 1);
    const __m512 some = _mm512_maskz_loadu_ps(valid, sums + i);
    _mm512_mask_storeu_epi32(to + i, valid, _mm512_cvtps_epi32(_mm512_mul_ps(some, factor)));
  }
}

// What the calls for a panel's rows ask of the memory ahead: each has every so many runs, so that
// memory is as busy beside the last rows as beside the first.
struct Share {
  int64_t call, calls;
};

// R rows times the 16 outputs of a panel. A 32-bit lane takes four unsigned levels times four
// signed activations at once, so that all formats stay unsigned and start from -offset * sum.
template <class Format, int R>
LONGSPAN_AVX512 inline void MultiplyRows(const BlockTile& t, int64_t row, const Share& share) {
  using Packed = PackedPanel<Format>;
  constexpr int kGroup = Format::kGroup;
  constexpr int kGroupsOfRun = 32 / kGroup;
  const int64_t groups = t.in / kGroup;
  // [R, groups], in room that a form which unpacks no panel leaves free.
  auto* starts = reinterpret_cast<int32_t*>(t.scratch.levels);
  if (Format::kOffset != 0) {
    ScaleSums((kGroup == 16 ? t.x.sum16 : t.x.sum32) + row * groups, R * groups, Format::kOffset,
              starts);
  }
  Stride of_q(t.in), of_scale(t.in / 8), of_start(4 * groups);
  Rows<int32_t> q(t.x.q + row * t.in, of_q);
  Rows<float> x_scale(t.x.scale + row * (t.in / 32), of_scale);
  Rows<float> x_scaled_sum(t.x.scaled_sum + row * (t.in / 32), of_scale);
  Rows<int32_t> start(starts, of_start);
  __m512 result[R];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) result[r] = _mm512_setzero_ps();
  const uint8_t* levels = t.panel;
  const uint8_t* block = t.panel + Packed::ScalesAt(t.in);
  int group = 0;  // of the block
  int64_t next_asked = share.call;
  for (int64_t run = 0; run < t.in / 32; ++run, levels += Packed::kRunBytes) {
    if (run == next_asked) {
      Prefetch<Packed::kRunShare>(t.panel + run * Packed::kRunShare + kAhead);
      next_asked += share.calls;
    }
    LONGSPAN_UNROLL
    for (int part = 0; part < kGroupsOfRun; ++part, ++group) {
      __m512i dot[R];
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        dot[r] = Format::kOffset == 0
                     ? _mm512_setzero_si512()
                     : _mm512_set1_epi32(start.At(kGroup == 32 ? of_scale : of_start, r, part));
      }
      LONGSPAN_UNROLL
      for (int s = 0; s < kGroup / 4; ++s) {
        const int step = part * (kGroup / 4) + s;
        const __m512i w = UnpackLevels<Format>(levels, step);
        LONGSPAN_UNROLL
        for (int r = 0; r < R; ++r) {
          dot[r] = _mm512_dpbusd_epi32(dot[r], w, _mm512_set1_epi32(q.At(of_q, r, step)));
        }
      }
      const __m512 scale = ScalesOf<Format>(block, group);
      __m512 min;
      if constexpr (Format::kMin) min = MinsOf<Format>(block, group);
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scale.At(of_scale, r, 0)));
        result[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r]), both, result[r]);
        if constexpr (Format::kMin) {
          result[r] =
              _mm512_fnmadd_ps(min, _mm512_set1_ps(x_scaled_sum.At(of_scale, r, 0)), result[r]);
        }
      }
    }
    of_q.Settle();
    of_scale.Settle();
    q.Advance(8);
    x_scale.Advance(1);
    if (Format::kMin) x_scaled_sum.Advance(1);
    if (Format::kOffset != 0) start.Advance(kGroupsOfRun);
    if (Format::kOffset != 0 && kGroup != 32) of_start.Settle();
    if (group == Packed::kGroups) {
      group = 0;
      block += Packed::kScaleBytes;
    }
  }
  const __mmask16 valid = static_cast<__mmask16>((1u << t.columns) - 1);
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    _mm512_mask_storeu_ps(t.out + (row + r) * t.out_stride, valid, result[r]);
  }
}

template <class Format>
LONGSPAN_AVX512 void MultiplyBlocks(const BlockTile& t) {
  int64_t row = 0;
  Share share = {0, t.rows / 8 + (t.rows & 4) / 4 + (t.rows & 2) / 2 + (t.rows & 1)};
  for (; row + 8 <= t.rows; row += 8, ++share.call) MultiplyRows<Format, 8>(t, row, share);
  for (; row + 4 <= t.rows; row += 4, ++share.call) MultiplyRows<Format, 4>(t, row, share);
  for (; row + 2 <= t.rows; row += 2, ++share.call) MultiplyRows<Format, 2>(t, row, share);
  if (row < t.rows) MultiplyRows<Format, 1>(t, row, share);
}

template <DType kType>
LONGSPAN_AVX512 inline __m512 LoadWeights(const std::byte* p) {
  if constexpr (kType == DType::kF32) {
    return _mm512_loadu_ps(p);
  } else {
    const __m256i half = Load256(p);
    if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

// R rows times C outputs; those beyond t.columns are dropped.
template <DType kType, int R, int C>
LONGSPAN_AVX512 inline void MultiplyFloatTile(const FloatTile& t, int64_t row, int64_t column) {
  constexpr int kBytes = Info(kType).block_bytes;
  const float* x = t.x + row * t.x_stride;
  const std::byte* w[C];
  FindWeights(t, column, w);
  __m512 sum[R][C];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) {
    LONGSPAN_UNROLL
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
  }
  const bool cold = t.cold && row == 0;
  const std::byte* next = FloatsAhead(w[0], C * t.weight_stride);
  for (int64_t i = 0; i < t.in; i += 16) {
    if (cold) Prefetch<16 * kBytes * C>(next + i * kBytes * C);
    __m512 weights[C];
    LONGSPAN_UNROLL
    for (int c = 0; c < C; ++c) weights[c] = LoadWeights<kType>(w[c] + i * kBytes);
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      const __m512 v = _mm512_loadu_ps(x + r * t.x_stride + i);
      LONGSPAN_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_fmadd_ps(v, weights[c], sum[r][c]);
    }
  }
  StoreSums<R, C>(t, row, column, sum);
}

template <DType kType>
struct FloatRows {
  template <int R, int C>
  LONGSPAN_AVX512 static void Multiply(const FloatTile& t, int64_t row, int64_t begin,
                                       int64_t end) {
    for (int64_t c = begin; c < end; c += C) MultiplyFloatTile<kType, R, C>(t, row, c);
  }
};

template <DType kType>
void MultiplyFloat(const FloatTile& t) {
  MultiplyInTiles<FloatRows<kType>>(t);
}

template <DType kType>
LONGSPAN_AVX512 void Widen(const std::byte* weights, int64_t count, float* out) {
  constexpr int kBytes = Info(kType).block_bytes;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_storeu_ps(out + i, LoadWeights<kType>(weights + i * kBytes));
  }
  DequantiseRow(kType, weights + i * kBytes, count - i, out + i);
}

template <DType kType>
constexpr FloatKernels FloatEntry() {
  return {MultiplyFloat<kType>, Widen<kType>};
}

}  // namespace

MatMulKernels Avx512MatMul(MatMulKernels kernels) {
  kernels.f32 = FloatEntry<DType::kF32>();
  kernels.f16 = FloatEntry<DType::kF16>();
  kernels.bf16 = FloatEntry<DType::kBF16>();
  kernels.float_columns = kFloatTileColumns;
  kernels.q8_0.multiply = MultiplyBlocks<FormatQ8_0>;
  kernels.q4_0.multiply = MultiplyBlocks<FormatQ4_0>;
  kernels.q5_0.multiply = MultiplyBlocks<FormatQ5_0>;
  kernels.q4_k.multiply = MultiplyBlocks<FormatQ4_K>;
  kernels.q5_k.multiply = MultiplyBlocks<FormatQ5_K>;
  kernels.q6_k.multiply = MultiplyBlocks<FormatQ6_K>;
  return kernels;
}

}  // namespace longspan::cpu
