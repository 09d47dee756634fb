#pragma once
// What the AVX-512 products with float weights share: how a product is cut into tiles, and how a
// tile's sums become results.
#include <immintrin.h>

#include <algorithm>

#include "kernels/cpu/matmul_kernels.h"
#include "kernels/cpu/target.h"

namespace longspan::cpu {

inline constexpr int kFloatTileColumns = 16;

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

// Calls Rows::Multiply<R, C>(tile, row, begin, end) for R rows and the outputs [begin, end), C at a
// time, until all are done. 24 sums, a step's weights and one x fit the 32 registers.
template <class Rows, class Tile>
void MultiplyInTiles(const Tile& t) {
  for (int64_t begin = 0; begin < t.columns; begin += kFloatTileColumns) {
    const int64_t end = std::min(begin + kFloatTileColumns, t.columns);
    int64_t row = 0;
    for (; row + 6 <= t.rows; row += 6) Rows::template Multiply<6, 4>(t, row, begin, end);
    switch (t.rows - row) {
      case 5:
        Rows::template Multiply<5, 4>(t, row, begin, end);
        break;
      case 4:
        Rows::template Multiply<4, 4>(t, row, begin, end);
        break;
      case 3:
        Rows::template Multiply<3, 4>(t, row, begin, end);
        break;
      case 2:
        Rows::template Multiply<2, 8>(t, row, begin, end);
        break;
      case 1:
        Rows::template Multiply<1, 8>(t, row, begin, end);
        break;
      default:
        break;
    }
  }
}

}  // namespace longspan::cpu
