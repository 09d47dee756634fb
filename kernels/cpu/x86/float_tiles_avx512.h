#pragma once
// How the sums of an AVX-512 tile of a product with float weights become results.
#include <immintrin.h>

#include <algorithm>

#include "kernels/cpu/float_tiles.h"

namespace longspan::cpu {

// Of each of four vectors: the upper half added to the lower, then ((l0 + l1) + (l2 + l3)) +
// ((l4 + l5) + (l6 + l7)).
LONGSPAN_AVX512 inline __m128 SumLanes(const __m512 v[4]) {
  __m256 eight[4];
  LONGSPAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    eight[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  }
  const __m256 all =
      _mm256_hadd_ps(_mm256_hadd_ps(eight[0], eight[1]), _mm256_hadd_ps(eight[2], eight[3]));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// The sums of R rows and C outputs; outputs beyond t.columns are dropped.
template <int R, int C, class Tile>
LONGSPAN_AVX512 inline void StoreSums(const Tile& t, int64_t row, int64_t column,
                                      const __m512 (&sum)[R][C]) {
  static_assert(C % 4 == 0);
  LONGSPAN_UNROLL
  for (int c = 0; c < C; c += 4) {
    const int64_t valid = std::clamp<int64_t>(t.columns - column - c, 0, 4);
    const __mmask8 mask = static_cast<__mmask8>((1u << valid) - 1);
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      float* out = t.out + (row + r) * t.out_stride + column + c;
      _mm_mask_storeu_ps(out, mask, SumLanes(sum[r] + c));
    }
  }
}

}  // namespace longspan::cpu
