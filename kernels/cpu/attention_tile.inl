// The one text of the tile functions. Included by attention_tile_*.cc with LONGSPAN_TARGET set to
// the attribute of the instruction set.
#include <cstring>

#include "kernels/convert.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/lanes.h"

namespace longspan::cpu {
namespace {

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

// Sums of eight accumulators' lanes, each as ((0+1)+(2+3))+((4+5)+(6+7)).
LONGSPAN_TARGET LONGSPAN_INLINE void Pairs(const Lanes& a, const Lanes& b, Lanes& out) {
  out = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
        __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
}

LONGSPAN_TARGET LONGSPAN_INLINE void SumEight(const Lanes (&a)[8], Lanes& out) {
  Lanes x[4], y[2];
  for (int i = 0; i < 4; ++i) Pairs(a[2 * i], a[2 * i + 1], x[i]);
  for (int i = 0; i < 2; ++i) Pairs(x[2 * i], x[2 * i + 1], y[i]);
  out = __builtin_shufflevector(y[0], y[1], 0, 1, 2, 3, 8, 9, 10, 11) +
        __builtin_shufflevector(y[0], y[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// kQ queries against 8 / kQ keys.
template <int kQ>
LONGSPAN_TARGET LONGSPAN_INLINE void ScoreTile(const float* queries, const float* keys, int padded,
                                               float* scores) {
  constexpr int kK = 8 / kQ;
  Lanes sums[8] = {};
  for (int d = 0; d < padded; d += kLanes) {
    Lanes key[kK];
    for (int k = 0; k < kK; ++k) key[k] = *reinterpret_cast<const Lanes*>(keys + k * padded + d);
    for (int q = 0; q < kQ; ++q) {
      const Lanes query = *reinterpret_cast<const Lanes*>(queries + q * padded + d);
      for (int k = 0; k < kK; ++k) sums[q * kK + k] += query * key[k];
    }
  }
  Lanes out;
  SumEight(sums, out);
  for (int q = 0; q < kQ; ++q) {
    std::memcpy(scores + q * kBlockKeys, reinterpret_cast<const float*>(&out) + q * kK,
                sizeof(float) * kK);
  }
}

LONGSPAN_TARGET void Scores(const float* queries, int count, const float* keys, int begin, int end,
                            int padded, float* scores) {
  int q = 0;
  for (; q + 2 <= count; q += 2) {
    for (int k = begin / 4 * 4; k < end; k += 4) {
      ScoreTile<2>(queries + q * padded, keys + k * padded, padded, scores + q * kBlockKeys + k);
    }
  }
  for (; q < count; ++q) {
    for (int k = begin / 8 * 8; k < end; k += 8) {
      ScoreTile<1>(queries + q * padded, keys + k * padded, padded, scores + q * kBlockKeys + k);
    }
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
  for (int q = 0; q < kQ; ++q) {
    for (int c = 0; c < kC; ++c) {
      sums[q][c] = *reinterpret_cast<const Lanes*>(out + q * padded + c * kLanes) * rescale[q];
    }
  }
  for (int k = begin; k < end; ++k) {
    Lanes value[kC];
    for (int c = 0; c < kC; ++c) {
      value[c] = *reinterpret_cast<const Lanes*>(values + k * padded + c * kLanes);
    }
    for (int q = 0; q < kQ; ++q) {
      const float weight = p[q * kBlockKeys + k];
      for (int c = 0; c < kC; ++c) sums[q][c] += value[c] * weight;
    }
  }
  for (int q = 0; q < kQ; ++q) {
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
  for (; q + 2 <= count; q += 2) {
    AccumulateRows<2>(p + q * kBlockKeys, values, begin, end, padded, rescale + q,
                      out + q * padded);
  }
  for (; q < count; ++q) {
    AccumulateRows<1>(p + q * kBlockKeys, values, begin, end, padded, rescale + q,
                      out + q * padded);
  }
}

}  // namespace
}  // namespace longspan::cpu
