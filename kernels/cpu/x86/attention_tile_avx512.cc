// The tile functions on 16 lanes. A sum over a row is taken over 16 lanes, the upper half added to
// the lower, then as the other tables do.
#if !defined(__clang__)
// GCC bug 105593: gcc 12 takes the "undefined" operands inside its own AVX-512 headers for
// mistakes.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

#include <cstring>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/target.h"
#include "kernels/cpu/x86/sets.h"
#include "kernels/cpu/x86/sum_lanes_avx512.h"

#define LONGSPAN_TARGET LONGSPAN_AVX512

namespace longspan::cpu {
namespace {

constexpr int kWide = 16;

// The elements of `valid` lanes at p; zero in the others.
template <DType kType>
LONGSPAN_AVX512 inline __m512 LoadWide(const std::byte* p, __mmask16 valid) {
  if constexpr (kType == DType::kF32) return _mm512_maskz_loadu_ps(valid, p);
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, p)), 16));
}

template <DType kType>
LONGSPAN_AVX512 inline void LoadRows(const std::byte* from, int64_t stride, int rows, int dim,
                                     int padded, float* to) {
  constexpr int kBytes = Info(kType).block_bytes;
  const int whole = dim / kWide * kWide;
  for (int row = 0; row < rows; ++row, from += stride, to += padded) {
    for (int d = 0; d < whole; d += kWide) {
      _mm512_storeu_ps(to + d, LoadWide<kType>(from + d * kBytes, 0xffff));
    }
    __mmask16 rest = static_cast<__mmask16>((1u << (dim - whole)) - 1);
    for (int d = whole; d < padded; d += kWide, rest = 0) {
      _mm512_storeu_ps(to + d, LoadWide<kType>(from + d * kBytes, rest));
    }
  }
}

// Whole blocks fill lanes: there is nothing to pad.
LONGSPAN_AVX512 inline void LoadBlocks(const std::byte* from, int64_t stride, int rows, int dim,
                                       float* to) {
  for (int row = 0; row < rows; ++row, from += stride) {
    const auto* blocks = reinterpret_cast<const BlockQ8_0*>(from);
    for (int b = 0; b < dim / 32; ++b) {
      const __m512 scale = _mm512_set1_ps(_cvtsh_ss(blocks[b].d));
      for (int i = 0; i < 32; i += kWide, to += kWide) {
        const auto* q = reinterpret_cast<const __m128i*>(blocks[b].q + i);
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(q));
        _mm512_storeu_ps(to, _mm512_mul_ps(scale, _mm512_cvtepi32_ps(wide)));
      }
    }
  }
}

LONGSPAN_AVX512 void Load(DType dtype, const std::byte* from, int64_t stride, int rows, int dim,
                          int padded, float* to) {
  if (dtype == DType::kQ8_0) return LoadBlocks(from, stride, rows, dim, to);
  (dtype == DType::kF32 ? LoadRows<DType::kF32> : LoadRows<DType::kBF16>)(from, stride, rows, dim,
                                                                          padded, to);
}

// kQ queries against 16 / kQ keys.
template <int kQ>
LONGSPAN_AVX512 inline void ScoreTile(const float* queries, const float* keys, int padded,
                                      float* scores) {
  constexpr int kK = 16 / kQ;
  __m512 sums[16];
  LONGSPAN_UNROLL
  for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_ps();
  for (int d = 0; d < padded; d += kWide) {
    __m512 query[kQ];
    LONGSPAN_UNROLL
    for (int q = 0; q < kQ; ++q) query[q] = _mm512_loadu_ps(queries + q * padded + d);
    LONGSPAN_UNROLL
    for (int k = 0; k < kK; ++k) {
      const __m512 key = _mm512_loadu_ps(keys + k * padded + d);
      LONGSPAN_UNROLL
      for (int q = 0; q < kQ; ++q)
        sums[q * kK + k] = _mm512_fmadd_ps(query[q], key, sums[q * kK + k]);
    }
  }
  float out[16];
  _mm512_storeu_ps(out, SumLanes(sums));
  LONGSPAN_UNROLL
  for (int q = 0; q < kQ; ++q) {
    std::memcpy(scores + q * kBlockKeys, out + q * kK, sizeof(float) * kK);
  }
}

// e^x for x <= 0 with a relative error below 2e-7, as Exp() in lanes.h; 0 below -87.
LONGSPAN_AVX512 inline __m512 ExpOf(__m512 x) {
  const __mmask16 in_range = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87), _CMP_GE_OQ);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f),
                                    _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x));
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  const __m512 e = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1));
  return _mm512_maskz_scalef_ps(in_range, e, n);
}

LONGSPAN_AVX512 void Softmax(float* scores, float previous_max, float* max, float* sum) {
  __m512 tops = _mm512_set1_ps(previous_max);
  for (int k = 0; k < kBlockKeys; k += kWide) {
    tops = _mm512_max_ps(tops, _mm512_loadu_ps(scores + k));
  }
  *max = _mm512_reduce_max_ps(tops);
  const __m512 highest = _mm512_set1_ps(*max);
  __m512 total = _mm512_setzero_ps();
  for (int k = 0; k < kBlockKeys; k += kWide) {
    const __m512 p = ExpOf(_mm512_sub_ps(_mm512_loadu_ps(scores + k), highest));
    _mm512_storeu_ps(scores + k, p);
    total = _mm512_add_ps(total, p);
  }
  *sum = _mm512_reduce_add_ps(total);
}

// kQ queries, kC * 16 channels.
template <int kQ, int kC>
LONGSPAN_AVX512 inline void AccumulateTile(const float* p, const float* values, int begin, int end,
                                           int padded, const float* rescale, float* out) {
  __m512 sums[kQ][kC];
  LONGSPAN_UNROLL
  for (int q = 0; q < kQ; ++q) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) {
      sums[q][c] =
          _mm512_mul_ps(_mm512_loadu_ps(out + q * padded + c * kWide), _mm512_set1_ps(rescale[q]));
    }
  }
  for (int k = begin; k < end; ++k) {
    __m512 value[kC];
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) value[c] = _mm512_loadu_ps(values + k * padded + c * kWide);
    LONGSPAN_UNROLL
    for (int q = 0; q < kQ; ++q) {
      const __m512 weight = _mm512_set1_ps(p[q * kBlockKeys + k]);
      LONGSPAN_UNROLL
      for (int c = 0; c < kC; ++c) sums[q][c] = _mm512_fmadd_ps(value[c], weight, sums[q][c]);
    }
  }
  LONGSPAN_UNROLL
  for (int q = 0; q < kQ; ++q) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) _mm512_storeu_ps(out + q * padded + c * kWide, sums[q][c]);
  }
}

}  // namespace
}  // namespace longspan::cpu

#include "kernels/cpu/attention_rows.inl"

namespace longspan::cpu {

const AttentionTile kAvx512AttentionTile = {kWide, Load, Scores, Softmax, Accumulate};

}  // namespace longspan::cpu
