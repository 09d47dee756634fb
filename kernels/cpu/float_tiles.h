#pragma once
// How the products with float weights are cut into tiles where there are 32 vector registers.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/matmul_kernels.h"
#include "kernels/cpu/target.h"

namespace longspan::cpu {

inline constexpr int kFloatTileColumns = 16;

// Where the weights of C outputs from `column` on begin; outputs beyond t.columns repeat the last
// one.
template <int C, class X>
LONGSPAN_INLINE void FindWeights(const ProductTile<X>& t, int64_t column,
                                 const std::byte* (&weights)[C]) {
  LONGSPAN_UNROLL
  for (int c = 0; c < C; ++c) {
    weights[c] = t.weights + std::min(column + c, t.columns - 1) * t.weight_stride;
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
