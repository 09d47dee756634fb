#pragma once
// What the forms of Attention share: split rows (attention.cu), for steps of few rows of a
// sequence, and tiles (attention_tiles.cu, attention_wgmma.cu), for many.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/context.h"
#include "kernels/cuda/kv_page.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/ops.h"

namespace longspan::cuda {

// AttentionArgs as kernels take them.
struct Problem {
  const float* query;
  const void *key, *value;
  void* out;  // F32 or BF16
  int64_t query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head;
  const float* sinks;
  KvView cache;
  RaggedBatch batch;
  SpanRequest spans;
  float scale, softcap;
  int window, heads, dim, group;
  bool half_out;       // out is BF16
  bool whole_vectors;  // rows of keys and values may be read in vectors
  int tile_rows;       // sequences of fewer rows in the step are attended row by row
};

// Row `j - start` of the step's own keys or values where j >= start, else the cache's position j.
// `flight`: the step's row that holds position `start`.
template <class T>
__device__ __forceinline__ const T* At(const Problem& p, int sequence, int start, int flight,
                                       int kv_head, int j, bool values) {
  if (j >= start) {
    const int64_t r = flight + j - start;
    return values ? static_cast<const T*>(p.value) + r * p.value_row + kv_head * p.value_head
                  : static_cast<const T*>(p.key) + r * p.key_row + kv_head * p.key_head;
  }
  const std::byte* page =
      Page(p.cache, sequence, j) + (values ? p.cache.value_offset : p.cache.key_offset);
  return reinterpret_cast<const T*>(page) +
         (int64_t{kv_head} * p.cache.page_tokens + j % p.cache.page_tokens) * p.dim;
}

// Numbers that lie side by side in out, from element `at` on.
template <int kCount>
__device__ __forceinline__ void StoreOut(const Problem& p, int64_t at, const Floats<kCount>& from) {
  if (p.half_out) {
    Store(from, static_cast<__nv_bfloat16*>(p.out) + at);
  } else {
    Store(from, static_cast<float*>(p.out) + at);
  }
}

__device__ __forceinline__ float Cap(float score, float softcap) {
  return softcap > 0 ? softcap * tanhf(score / softcap) : score;
}

constexpr int kSplitKeys = 128;  // a row with fewer keys is not split
constexpr int kMaxSplits = 64;
constexpr int kSplitUnit = 16;  // splits begin at multiples of it from the first key on

// The rows that one launch takes, and where their partial results go. out may be nullptr.
struct Piece : Problem {
  int first_row;
  float* partial;  // [rows of the launch, heads, kMaxSplits, PartialStride(dim)]
  // Of all these rows where any is observed, else nullptr: [rows of the launch, heads,
  // score_stride], from the first key seen on.
  float* scores;
  int64_t score_stride;  // at least the keys that a row sees
  int first_observed;    // the first of SpanRequest::rows among them
  // ObserveSpans has to wait for the kernel before it, which makes the scores.
  bool observes_late;
};

// Of a partial result: sums, then maximum and total, in whole vectors of four.
__host__ __device__ constexpr int PartialStride(int dim) { return (dim + 2 + 3) / 4 * 4; }
__device__ __forceinline__ float* Partials(const Piece& p, int row, int head, int split) {
  return p.partial + ((int64_t{row} * p.heads + head) * kMaxSplits + split) * PartialStride(p.dim);
}
__device__ __forceinline__ float* Scores(const Piece& p, int row, int head) {
  return p.scores + (int64_t{row} * p.heads + head) * p.score_stride;
}

// What one row sees.
struct Row {
  int sequence, start, flight;  // flight: the step's row that holds position `start`
  int position, first, splits, chunk;

  __device__ Row(const Problem& p, int row) {
    // In a step that decodes, row i is sequence i's: its numbers are read at once, not in turn.
    int s = min(row, p.batch.sequences - 1), end = s + 1;
    start = p.batch.start[s];
    flight = p.batch.row_begin[s];
    const bool guessed = flight <= row && p.batch.row_begin[end] > row;
    if (!guessed) s = 0, end = p.batch.sequences;
    while (end - s > 1) {
      const int middle = (s + end) / 2;
      if (p.batch.row_begin[middle] <= row) {
        s = middle;
      } else {
        end = middle;
      }
    }
    sequence = s;
    if (!guessed) {
      start = p.batch.start[s];
      flight = p.batch.row_begin[s];
    }
    position = start + row - flight;
    first = p.window > 0 ? max(0, position - p.window + 1) : 0;
    const int keys = position - first + 1;
    splits = min((keys + kSplitKeys - 1) / kSplitKeys, kMaxSplits);
    chunk = (keys + splits * kSplitUnit - 1) / (splits * kSplitUnit) * kSplitUnit;
    splits = (keys + chunk - 1) / chunk;
  }
};

// Of any row, whatever its length: what a cache layer can hold bounds it.
inline int64_t MostKeys(const Problem& p) {
  const int64_t cached = int64_t{p.cache.slots} * p.cache.page_tokens;
  return p.window > 0 ? p.window : cached + p.batch.rows;
}
inline int MostSplits(const Problem& p) {
  return static_cast<int>(
      std::min<int64_t>((MostKeys(p) + kSplitKeys - 1) / kSplitKeys, kMaxSplits));
}

// Partial results of `rows` rows from bf16 keys and values in whole vectors.
bool SplitsInVectors(const Problem& problem);
void AttendSplits(BackendContext& context, const Piece& piece, int rows);
// Rows that see at most so many keys as a cluster's blocks take: their results.
bool AttendsInClusters(const BackendContext& context, const Problem& problem);
void AttendClusters(BackendContext& context, const Piece& piece, int rows);
// The records of `observed` rows. Launched after Merge, it may run beside it.
void ObserveSpans(BackendContext& context, const Piece& piece, int observed);

// Calls visitor(size) with the least of 64, 128 and 256 that holds a head, as a constant.
template <class Visitor>
void VisitHeadSize(const Problem& p, const Visitor& visitor) {
  if (p.dim <= 64) {
    visitor(std::integral_constant<int, 64>{});
  } else if (p.dim <= 128) {
    visitor(std::integral_constant<int, 128>{});
  } else {
    visitor(std::integral_constant<int, 256>{});
  }
}

constexpr float kLog2E = 1.4426950408889634f;

// Which rows of a step a block attends that takes up to kRows query rows of one sequence and KV
// head: of `sequence`, whose rows begin at `flight` and at position `start`, the `rows` from
// `first` on. Query row r is head r % group of the KV head at position start + r / group.
struct Tile {
  int sequence, start, flight, first, rows;
};

// Tiles in the order of sequences; of a sequence with few rows none.
template <int kRows>
__device__ Tile FindTile(const Problem& p, int index) {
  int s = 0;
  if (p.tile_rows == 1 && p.batch.rows == p.batch.sequences) {  // all decode: no search
    const int tiles = (p.group + kRows - 1) / kRows;
    s = index / tiles;
    index %= tiles;
  }
  for (;; ++s) {
    const int begin = p.batch.row_begin[s], rows = p.batch.row_begin[s + 1] - begin;
    if (rows < p.tile_rows) continue;
    const int tiles = (rows * p.group + kRows - 1) / kRows;
    if (index < tiles) {
      const int first = index * kRows;
      return {s, p.batch.start[s], begin, first, min(kRows, rows * p.group - first)};
    }
    index -= tiles;
  }
}
template <int kRows>
int CountTiles(const Problem& p) {
  const int32_t* begin = p.batch.HostRowBegin();
  int tiles = 0;
  for (int s = 0; s < p.batch.sequences; ++s) {
    const int rows = begin[s + 1] - begin[s];
    if (rows >= p.tile_rows) tiles += (rows * p.group + kRows - 1) / kRows;
  }
  return tiles;
}

// Problem::tile_rows, if AttendsInTiles; on a deterministic backend every sequence's rows are.
constexpr int kTileRows = 16;
bool AttendsInTiles(const Problem& problem);
// The sequences that have at least tile_rows rows.
void AttendTiles(BackendContext& context, const Problem& problem);
// The same where a BF16 out allows queries and probabilities of that type, on sm_90a.
bool AttendsInWgmma(const BackendContext& context, const Problem& problem);
void AttendWgmma(BackendContext& context, const Problem& problem);

}  // namespace longspan::cuda
