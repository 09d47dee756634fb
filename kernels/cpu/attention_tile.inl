// The one text of the tile functions. Included by attention_tile_*.cc with LONGSPAN_TARGET set to
// the attribute of the instruction set.
#include <cstring>

#include "kernels/convert.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/lanes.h"

namespace longspan::cpu {
namespace {

typedef float FourLanes __attribute__((vector_size(16)));

// Whether three queries are taken next of so many that are left. Of three, twelve sums, the queries
// and a key fit 16 registers, and seven loads serve twelve products; of two it is six for eight;
// one waits for its own sums, so four are two and two.
inline bool TakeThree(int left) { return left == 3 || left > 4; }

LONGSPAN_TARGET void Load(DType dtype, const std::byte* from, int64_t stride, int rows, int dim,
                          int padded, float* to) {
  for (int row = 0; row < rows; ++row, from += stride, to += padded) {
    if (dtype == DType::kF32) {
      std::memcpy(to, from, sizeof(float) * dim);
    } else if (dtype == DType::kQ8_0) {
      const auto* blocks = reinterpret_cast<const BlockQ8_0*>(from);
      for (int d = 0; d < dim; d += 32, ++blocks) {
        const float scale = HalfToFloat(blocks->d);
        for (int i = 0; i < 32; ++i) to[d + i] = scale * blocks->q[i];
      }
    } else {
      const auto* halves = reinterpret_cast<const uint16_t*>(from);
      auto* bits = reinterpret_cast<uint32_t*>(to);
      for (int d = 0; d < dim; ++d) bits[d] = static_cast<uint32_t>(halves[d]) << 16;
    }
    for (int d = dim; d < padded; ++d) to[d] = 0;
  }
}

LONGSPAN_TARGET LONGSPAN_INLINE void Pairs(const Lanes& a, const Lanes& b, Lanes& out) {
  out = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
        __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

// Sums of four accumulators' lanes, each as ((0+1)+(2+3))+((4+5)+(6+7)).
LONGSPAN_TARGET LONGSPAN_INLINE void SumFour(const Lanes* a, float* to) {
  Lanes x[2], y;
  Pairs(a[0], a[1], x[0]);
  Pairs(a[2], a[3], x[1]);
  Pairs(x[0], x[1], y);
  const FourLanes sums =
      __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
  std::memcpy(to, &sums, sizeof(sums));
}

// kQ queries against kK keys, a multiple of four.
template <int kQ, int kK>
LONGSPAN_TARGET LONGSPAN_INLINE void ScoreTile(const float* queries, const float* keys, int padded,
                                               float* scores) {
  Lanes sums[kQ * kK] = {};
  for (int d = 0; d < padded; d += kLanes) {
    Lanes query[kQ];
    LONGSPAN_UNROLL
    for (int q = 0; q < kQ; ++q) {
      query[q] = *reinterpret_cast<const Lanes*>(queries + q * padded + d);
    }
    LONGSPAN_UNROLL
    for (int k = 0; k < kK; ++k) {
      const Lanes key = *reinterpret_cast<const Lanes*>(keys + k * padded + d);
      LONGSPAN_UNROLL
      for (int q = 0; q < kQ; ++q) sums[q * kK + k] += query[q] * key;
    }
  }
  LONGSPAN_UNROLL
  for (int i = 0; i < kQ * kK; i += 4) {
    SumFour(sums + i, scores + i / kK * kBlockKeys + i % kK);
  }
}

template <int kQ, int kK>
LONGSPAN_TARGET LONGSPAN_INLINE void ScoreRows(const float* queries, const float* keys, int begin,
                                               int end, int padded, float* scores) {
  for (int k = begin / kK * kK; k < end; k += kK) {
    ScoreTile<kQ, kK>(queries, keys + k * padded, padded, scores + k);
  }
}

LONGSPAN_TARGET void Scores(const float* queries, int count, const float* keys, int begin, int end,
                            int padded, float* scores) {
  int q = 0;
  for (; TakeThree(count - q); q += 3) {
    ScoreRows<3, 4>(queries + q * padded, keys, begin, end, padded, scores + q * kBlockKeys);
  }
  for (; q + 2 <= count; q += 2) {
    ScoreRows<2, 4>(queries + q * padded, keys, begin, end, padded, scores + q * kBlockKeys);
  }
  if (q < count) {
    ScoreRows<1, 8>(queries + q * padded, keys, begin, end, padded, scores + q * kBlockKeys);
  }
}

LONGSPAN_TARGET void Softmax(float* scores, float previous_max, float* max, float* sum) {
  Lanes tops = *reinterpret_cast<Lanes*>(scores);
  for (int k = kLanes; k < kBlockKeys; k += kLanes) {
    const Lanes more = *reinterpret_cast<Lanes*>(scores + k);
    tops = more > tops ? more : tops;
  }
  float highest = previous_max;
  for (int i = 0; i < kLanes; ++i) highest = tops[i] > highest ? tops[i] : highest;
  Lanes total = {};
  for (int k = 0; k < kBlockKeys; k += kLanes) {
    Lanes& some = *reinterpret_cast<Lanes*>(scores + k);
    const Lanes below = some - highest;
    Exp(below, some);
    total += some;
  }
  *max = highest;
  *sum = ((total[0] + total[1]) + (total[2] + total[3])) +
         ((total[4] + total[5]) + (total[6] + total[7]));
}

// kQ queries, kC * 8 channels.
template <int kQ, int kC>
LONGSPAN_TARGET LONGSPAN_INLINE void AccumulateTile(const float* p, const float* values, int begin,
                                                    int end, int padded, const float* rescale,
                                                    float* out) {
  Lanes sums[kQ][kC];
  LONGSPAN_UNROLL
  for (int q = 0; q < kQ; ++q) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) {
      sums[q][c] = *reinterpret_cast<const Lanes*>(out + q * padded + c * kLanes) * rescale[q];
    }
  }
  for (int k = begin; k < end; ++k) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c) {
      const Lanes value = *reinterpret_cast<const Lanes*>(values + k * padded + c * kLanes);
      LONGSPAN_UNROLL
      for (int q = 0; q < kQ; ++q) sums[q][c] += value * p[q * kBlockKeys + k];
    }
  }
  LONGSPAN_UNROLL
  for (int q = 0; q < kQ; ++q) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kC; ++c)
      *reinterpret_cast<Lanes*>(out + q * padded + c * kLanes) = sums[q][c];
  }
}

template <int kQ>
LONGSPAN_TARGET LONGSPAN_INLINE void AccumulateRows(const float* p, const float* values, int begin,
                                                    int end, int padded, const float* rescale,
                                                    float* out) {
  int d = 0;
  for (; d + 4 * kLanes <= padded; d += 4 * kLanes) {
    AccumulateTile<kQ, 4>(p, values + d, begin, end, padded, rescale, out + d);
  }
  for (; d < padded; d += kLanes) {
    AccumulateTile<kQ, 1>(p, values + d, begin, end, padded, rescale, out + d);
  }
}

LONGSPAN_TARGET void Accumulate(const float* p, int count, const float* values, int begin, int end,
                                int padded, const float* rescale, float* out) {
  int q = 0;
  for (; TakeThree(count - q); q += 3) {
    AccumulateRows<3>(p + q * kBlockKeys, values, begin, end, padded, rescale + q,
                      out + q * padded);
  }
  for (; q + 2 <= count; q += 2) {
    AccumulateRows<2>(p + q * kBlockKeys, values, begin, end, padded, rescale + q,
                      out + q * padded);
  }
  if (q < count) {
    AccumulateRows<1>(p + q * kBlockKeys, values, begin, end, padded, rescale + q,
                      out + q * padded);
  }
}

}  // namespace
}  // namespace longspan::cpu
