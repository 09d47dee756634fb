#pragma once
// How the sums of an AVX-512 tile of a product with float weights become results.
#include <immintrin.h>

#include <algorithm>

#include "kernels/cpu/float_tiles.h"
#include "kernels/cpu/x86/sum_lanes_avx512.h"

namespace longspan::cpu {

// The sums of rows [kFirst, R) and four outputs from column c on, of which `valid` are stored.
template <int kFirst, int R, int C, class Tile>
LONGSPAN_AVX512 LONGSPAN_INLINE void StoreRows(const Tile& t, int64_t row, int64_t column, int c,
                                               __mmask8 valid, const __m512 (&sum)[R][C]) {
  if constexpr (kFirst < R) {
    constexpr int kLeft = R - kFirst, kRows = kLeft >= 4 ? 4 : kLeft >= 2 ? 2 : 1;
    __m512 some[4 * kRows];
    LONGSPAN_UNROLL
    for (int i = 0; i < 4 * kRows; ++i) some[i] = sum[kFirst + i / 4][c + i % 4];
    const auto sums = SumLanes(some);
    float* out = t.out + (row + kFirst) * t.out_stride + column + c;
    if constexpr (kRows == 1) {
      _mm_mask_storeu_ps(out, valid, sums);
    } else if constexpr (kRows == 2) {
      _mm_mask_storeu_ps(out, valid, _mm256_castps256_ps128(sums));
      _mm_mask_storeu_ps(out + t.out_stride, valid, _mm256_extractf128_ps(sums, 1));
    } else {
      _mm_mask_storeu_ps(out, valid, _mm512_castps512_ps128(sums));
      _mm_mask_storeu_ps(out + t.out_stride, valid, _mm512_extractf32x4_ps(sums, 1));
      _mm_mask_storeu_ps(out + 2 * t.out_stride, valid, _mm512_extractf32x4_ps(sums, 2));
      _mm_mask_storeu_ps(out + 3 * t.out_stride, valid, _mm512_extractf32x4_ps(sums, 3));
    }
    StoreRows<kFirst + kRows, R, C>(t, row, column, c, valid, sum);
  }
}

// The sums of R rows and C outputs; outputs beyond t.columns are dropped.
template <int R, int C, class Tile>
LONGSPAN_AVX512 LONGSPAN_INLINE void StoreSums(const Tile& t, int64_t row, int64_t column,
                                               const __m512 (&sum)[R][C]) {
  static_assert(C % 4 == 0);
  LONGSPAN_UNROLL
  for (int c = 0; c < C; c += 4) {
    const int64_t count = std::clamp<int64_t>(t.columns - column - c, 0, 4);
    StoreRows<0, R, C>(t, row, column, c, static_cast<__mmask8>((1u << count) - 1), sum);
  }
}

}  // namespace longspan::cpu
