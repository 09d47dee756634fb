#pragma once
// Sums over the lanes of vectors: of each the upper half added to the lower, then ((l0 + l1) + (l2
// + l3)) + ((l4 + l5) + (l6 + l7)). Sixteen at once take half of the instructions that four at a
// time do.
#include <immintrin.h>

#include "kernels/cpu/target.h"

namespace longspan::cpu {

LONGSPAN_AVX512 LONGSPAN_INLINE __m512 SumPairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// Of two vectors the lower and upper halves added, side by side.
LONGSPAN_AVX512 LONGSPAN_INLINE __m512 SumHalves(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

// Lane i: the sum of v[i]'s lanes.
LONGSPAN_AVX512 LONGSPAN_INLINE __m512 SumLanes(const __m512 (&v)[16]) {
  __m512 half[8], two[4], one[2];
  LONGSPAN_UNROLL
  for (int i = 0; i < 8; ++i) half[i] = SumHalves(v[i], v[i + 8]);
  LONGSPAN_UNROLL
  for (int i = 0; i < 4; ++i) two[i] = SumPairs(half[2 * i], half[2 * i + 1]);
  LONGSPAN_UNROLL
  for (int i = 0; i < 2; ++i) one[i] = SumPairs(two[2 * i], two[2 * i + 1]);
  // Quarters of one[0]: v0..3 low, v0..3 high, v8..11 low, v8..11 high; of one[1] the rest.
  const __m512 low = _mm512_shuffle_f32x4(one[0], one[1], 0x88);  // v0..3 v8..11 v4..7 v12..15
  const __m512 high = _mm512_shuffle_f32x4(one[0], one[1], 0xdd);
  const __m512 sum = _mm512_add_ps(low, high);
  return _mm512_shuffle_f32x4(sum, sum, 0xd8);
}

LONGSPAN_AVX512 LONGSPAN_INLINE __m256 SumLanes(const __m512 (&v)[8]) {
  __m512 half[4], two[2];
  LONGSPAN_UNROLL
  for (int i = 0; i < 4; ++i) half[i] = SumHalves(v[i], v[i + 4]);
  LONGSPAN_UNROLL
  for (int i = 0; i < 2; ++i) two[i] = SumPairs(half[2 * i], half[2 * i + 1]);
  // Quarters: v0..3 low, v0..3 high, v4..7 low, v4..7 high.
  const __m512 one = SumPairs(two[0], two[1]);
  const __m512 sum =
      _mm512_add_ps(_mm512_shuffle_f32x4(one, one, 0x88), _mm512_shuffle_f32x4(one, one, 0xdd));
  return _mm512_castps512_ps256(sum);
}

LONGSPAN_AVX512 LONGSPAN_INLINE __m128 SumLanes(const __m512 (&v)[4]) {
  __m256 eight[4];
  LONGSPAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    eight[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  }
  const __m256 all =
      _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]), _mm256_hadd_ps(eight[2], eight[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

}  // namespace longspan::cpu
