// Rows of scores and of sums by ScoreTile and AccumulateTile of the file that includes this, whose
// vectors have kWide lanes, in the instructions that LONGSPAN_TARGET names. 16 sums, a tile's
// queries and a key fit 32 registers.
#include "kernels/cpu/attention_tile.h"

namespace longspan::cpu {
namespace {

template <int kQ>
LONGSPAN_TARGET inline void ScoreRows(const float* queries, const float* keys, int begin, int end,
                                      int padded, float* scores) {
  constexpr int kK = 16 / kQ;
  for (int k = begin / kK * kK; k < end; k += kK) {
    ScoreTile<kQ>(queries, keys + k * padded, padded, scores + k);
  }
}

LONGSPAN_TARGET void Scores(const float* queries, int count, const float* keys, int begin, int end,
                            int padded, float* scores) {
  int q = 0;
  for (; q + 4 <= count; q += 4) {
    ScoreRows<4>(queries + q * padded, keys, begin, end, padded, scores + q * kBlockKeys);
  }
  for (; q + 2 <= count; q += 2) {
    ScoreRows<2>(queries + q * padded, keys, begin, end, padded, scores + q * kBlockKeys);
  }
  for (; q < count; ++q)
    ScoreRows<1>(queries + q * padded, keys, begin, end, padded, scores + q * kBlockKeys);
}

template <int kQ>
LONGSPAN_TARGET inline void AccumulateRows(const float* p, const float* values, int begin, int end,
                                           int padded, const float* rescale, float* out) {
  int d = 0;
  for (; d + 4 * kWide <= padded; d += 4 * kWide) {
    AccumulateTile<kQ, 4>(p, values + d, begin, end, padded, rescale, out + d);
  }
  for (; d < padded; d += kWide) {
    AccumulateTile<kQ, 1>(p, values + d, begin, end, padded, rescale, out + d);
  }
}

LONGSPAN_TARGET void Accumulate(const float* p, int count, const float* values, int begin, int end,
                                int padded, const float* rescale, float* out) {
  int q = 0;
  for (; q + 4 <= count; q += 4) {
    AccumulateRows<4>(p + q * kBlockKeys, values, begin, end, padded, rescale + q,
                      out + q * padded);
  }
  for (; q < count; ++q) {
    AccumulateRows<1>(p + q * kBlockKeys, values, begin, end, padded, rescale + q,
                      out + q * padded);
  }
}

}  // namespace
}  // namespace longspan::cpu
