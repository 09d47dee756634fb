#pragma once
// What the forms of Attention share: rows one by one (attention.cu), for steps of few rows of a
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
constexpr int kHeads = 8;       // query heads of a KV head that are attended together, at most

// Whose keys a partial result is of.
enum class Parts {
  kSplits,  // a row's splits: so many keys each as follows from the row alone
  kShares,  // what of it lies in one of the launch's shares (see Shares)
  kWhole    // all the row's: there is one
};

// The rows that one launch takes, and where their partial results go. out may be nullptr.
struct Piece : Problem {
  Parts parts;
  int first_row, rows;
  // Sums, then maximum and total: PartialStride(dim) floats each; whose, PartialsOf() tells.
  float* partial;
  // Of all these rows where any is observed, else nullptr: [rows of the launch, heads,
  // score_stride], from the first key seen on.
  float* scores;
  int64_t score_stride;  // a multiple of 4, at least the keys that a row sees
  int first_observed;    // the first of SpanRequest::rows among them
  // Of kShares: how many at most, and the steps of the rows before each, [rows + 1], which
  // AttendShares writes.
  int most_shares;
  int* steps_before;
  bool late;  // the records are made at the graph's end: see TakeLate
};

// Of a partial result, in whole vectors of four.
__host__ __device__ constexpr int PartialStride(int dim) { return (dim + 2 + 3) / 4 * 4; }
__device__ __forceinline__ float* Scores(const Piece& p, int row, int head) {
  return p.scores + (int64_t{row} * p.heads + head) * p.score_stride;
}

// The query heads of a KV head are attended in groups of kHeads, and a row so in strands: one for
// each group of each KV head.
__host__ __device__ inline int HeadGroups(const Problem& p) {
  return (p.group + kHeads - 1) / kHeads;
}
__host__ __device__ inline int StrandsOfRow(const Problem& p) {
  return p.cache.kv_heads * HeadGroups(p);
}
__host__ __device__ inline int HeadsOfStrand(const Problem& p) {
  return p.group < kHeads ? p.group : kHeads;
}
struct Strand {
  int kv_head, first_head, heads;

  __device__ __forceinline__ Strand(const Problem& p, int strand)
      : kv_head(strand / HeadGroups(p)),
        first_head(kv_head * p.group + strand % HeadGroups(p) * kHeads),
        heads(min(kHeads, (kv_head + 1) * p.group - first_head)) {}
};

// The steps of all strands of a launch's rows, strand after strand, row after row, cut into even
// shares whose borders lie where they fall. Of a strand and a share that meet the partial result
// has the sum of their numbers as its own: on the way through the steps one or the other goes up.
struct Shares {
  int64_t steps;
  int count;

  __device__ Shares(const Piece& p, int steps_of_rows)
      : steps(int64_t{steps_of_rows} * StrandsOfRow(p)) {
    const int64_t fewest = min(steps / kLeastSteps, int64_t{p.most_shares / kFewestOf});
    count = static_cast<int>(
        max(int64_t{1}, max(fewest, min(steps / kManySteps, int64_t{p.most_shares}))));
  }
  __device__ int64_t Begin(int share) const { return steps * share / count; }
  __device__ int Of(int64_t step) const {
    return static_cast<int>(((step + 1) * count - 1) / steps);
  }

  // Up to half of the warps take part where each has kLeastSteps, all once each has kManySteps:
  // what they ask for at once is in the way of what they begin with, and a share more is one to
  // merge. On an H100, us: 1 x 32K, heads of 128, 8 steps at least for all 72.8, 32 67.9; 32 x 2K,
  // heads of 256, 115.2 and 113.7; 1 x 2K with all from 8 on, none before, 23.5, so 20.2.
  static constexpr int kLeastSteps = 2, kManySteps = 32, kFewestOf = 2;
};

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

// The partial results of a launch's row and head, `stride` floats from one to the next.
struct PartialRange {
  float* first;
  int64_t stride;
  int count;
};
__device__ __forceinline__ PartialRange PartialsOf(const Piece& p, int row, int head) {
  const int64_t stride = PartialStride(p.dim), at = int64_t{row} * p.heads + head;
  if (p.parts == Parts::kWhole) return {p.partial + at * stride, stride, 1};
  if (p.parts == Parts::kSplits) {
    return {p.partial + at * kMaxSplits * stride, stride, Row(p, p.first_row + row).splits};
  }
  const int before = p.steps_before[row], steps = p.steps_before[row + 1] - before;
  const Shares shares(p, p.steps_before[p.rows]);
  const int strands = StrandsOfRow(p), heads = HeadsOfStrand(p), of_group = head % p.group;
  const int strand = head / p.group * HeadGroups(p) + of_group / kHeads;
  const int64_t begin = int64_t{before} * strands + int64_t{steps} * strand;
  const int first = shares.Of(begin), last = shares.Of(begin + steps - 1);
  const int64_t number = int64_t{row} * strands + strand + first;
  return {p.partial + (number * heads + of_group % kHeads) * stride, heads * stride,
          last - first + 1};
}

// The highest score that a row's head sees, and the total of exp(score - highest): of all partial
// results and the sink. By a warp, for each lane.
struct Softmax {
  float highest, total;
};
__device__ __forceinline__ Softmax SoftmaxOf(const Piece& p, const PartialRange& parts, int head) {
  const float sink = p.sinks != nullptr ? p.sinks[head] : -INFINITY;
  Softmax of_lane = {-INFINITY, 0};
  for (int i = threadIdx.x % kWarp; i < parts.count; i += kWarp) {
    const float* part = parts.first + i * parts.stride + p.dim;
    const float highest = fmaxf(of_lane.highest, part[0]);
    of_lane.total =
        of_lane.total * expf(of_lane.highest - highest) + part[1] * expf(part[0] - highest);
    of_lane.highest = highest;
  }
  float highest = fmaxf(sink, of_lane.highest);
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
  }
  return {highest, WarpSum(of_lane.total * expf(of_lane.highest - highest)) +
                       (p.sinks != nullptr ? expf(sink - highest) : 0.0f)};
}

// Of any row, whatever its length: what a cache layer can hold bounds it.
inline int64_t MostKeys(const Problem& p) {
  const int64_t cached = int64_t{p.cache.slots} * p.cache.page_tokens;
  return p.window > 0 ? p.window : cached + p.batch.rows;
}
inline int MostSplits(const Problem& p) {
  return static_cast<int>(
      std::min<int64_t>((MostKeys(p) + kSplitKeys - 1) / kSplitKeys, kMaxSplits));
}

// From bf16 keys and values in whole vectors: partial results of a piece's rows, in shares.
bool AttendsInShares(const Problem& problem);
int MostShares(const BackendContext& context, const Problem& problem);
void AttendShares(BackendContext& context, const Piece& piece);
constexpr int kMostShareRows = 1024;  // of a piece
// Rows that see few keys: their results.
bool AttendsInClusters(const BackendContext& context, const Problem& problem);
void AttendClusters(BackendContext& context, const Piece& piece);
// The records of `observed` rows, late or now: after Merge, where there is one, beside which it may
// run.
void ObserveSpans(BackendContext& context, const Piece& piece, int observed);
// Memory that is a piece's until the graph ends that is being captured, so that its records are
// made late. nullptr: none is being captured, or there is no more memory.
void* TakeLate(BackendContext& context, size_t bytes);

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
