#pragma once
// The inner loops of CPU attention, one table per instruction set. A tile is up to kTileQueries
// queries against one block of kBlockKeys keys; all rows are zero-padded to a multiple of `lanes`.
#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace longspan::cpu {

inline constexpr int kBlockKeys = 64;  // keys of a block, aligned to absolute positions
// (token, head) pairs of a tile: amortises loading a block. Gemma 3 270M, AVX-512, 2 threads of an
// AMD EPYC (Zen 4), at 64 and at 128, the least of 15 runs in ms: 8,192 tokens through a full layer
// 736 and 724, through a window of 512 90.0 and 90.5; 128 tokens 0.27 and 0.37.
inline constexpr int kTileQueries = 64;

struct AttentionTile {
  int lanes;  // 4, 8 or 16
  // Rows of `dim` elements (F32, BF16 or whole blocks of Q8_0), `stride` bytes apart, as F32, each
  // zero-padded to `padded`.
  void (*load)(DType dtype, const std::byte* from, int64_t stride, int rows, int dim, int padded,
               float* to);
  // scores[q][k] = queries[q] · keys[k] for keys [begin, end) and maybe their neighbours in the
  // block. Each sum is taken over `lanes` lanes, then over them in a fixed tree, whatever the tile.
  void (*scores)(const float* queries, int count, const float* keys, int begin, int end, int padded,
                 float* scores);
  // One row of scores (-inf where masked, at least one finite): p = e^(s - max), returns
  // max(previous max, scores) and the sum of p.
  void (*softmax)(float* scores, float previous_max, float* max, float* sum);
  // out[q] = out[q] * rescale[q] + sum over keys [begin, end) of p[q][k] * values[k].
  void (*accumulate)(const float* p, int count, const float* values, int begin, int end, int padded,
                     const float* rescale, float* out);
};

extern const AttentionTile kPortableAttentionTile;

}  // namespace longspan::cpu
