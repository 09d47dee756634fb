// Softmax attention over paged and ring caches, row by row; many rows of a sequence go to
// attention_tiles.cu. Bytes: each visible key and value once per KV head (once per 8 query heads of
// it, 4 in fp32); operations: 4 * head_dim per query head and key.
//
// Over bf16 keys, rows that see few are attended by clusters of blocks (attention_clusters.cu),
// others by warps that have even shares of all keys (attention_shares.cu); what follows there for a
// row depends, to rounding, on the rows beside it. Over others a row's keys are cut into splits by
// its own length alone, so that its result depends neither on its neighbours nor on the chunk it
// arrived in; a block makes a split's partial result. A second kernel merges partial results in
// order. Observed rows also leave their scores, from which another kernel makes records
// (attention_spans.cu): of a graph at its end, else beside the merge where there is one. An
// observed row that is attended in a tile is attended once more for that.
#include <algorithm>
#include <utility>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 4;  // of a partial block; they take its keys in turn
constexpr int kMergeThreads = 256;
constexpr int kKeys = 4;  // of a warp at a time: loads in flight before the first is used

template <class T>
__device__ __forceinline__ const T* At(const Problem& p, const Row& row, int kv_head, int j,
                                       bool values) {
  return At<T>(p, row.sequence, row.start, row.flight, kv_head, j, values);
}

// This lane's kPer elements of a row of `dim`: zero beyond its end.
template <class T, int kPer>
__device__ __forceinline__ void Load(const T* from, int dim, bool whole, float (&to)[kPer]) {
  const int d = static_cast<int>(threadIdx.x % kWarp) * kPer;
  struct alignas(sizeof(T) * kPer) Vector {
    T at[kPer];
  };
  if (whole) {
    if (d < dim) {
      const Vector v = *reinterpret_cast<const Vector*>(from + d);
#pragma unroll
      for (int i = 0; i < kPer; ++i) to[i] = ToFloat(v.at[i]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) to[i] = d + i < dim ? ToFloat(from[d + i]) : 0.0f;
}

template <int kPer>
__device__ __forceinline__ float Dot(const float (&a)[kPer], const float (&b)[kPer]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum = fmaf(a[i], b[i], sum);
  return WarpSum(sum);
}

// grid: rows, KV heads times groups of kHeads query heads, kMaxSplits.
template <class T, int kPer, int kHeads, bool kObserve>
__global__ void __launch_bounds__(kWarps* kWarp) Partial(const Piece p) {
  const int row_index = p.first_row + blockIdx.x;
  const Row row(p, row_index);
  const int split = blockIdx.z;
  if (split >= row.splits) return;
  const int groups = (p.group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / groups;
  const int first_head = kv_head * p.group + blockIdx.y % groups * kHeads;
  const int heads = min(kHeads, (kv_head + 1) * p.group - first_head);
  const int begin = row.first + split * row.chunk;
  const int end = min(begin + row.chunk, row.position + 1);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  float query[kHeads][kPer], sum[kHeads][kPer] = {}, highest[kHeads], total[kHeads] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = first_head + min(h, heads - 1);
    const float* from = p.query + row_index * p.query_row + head * p.query_head;
    Load<float, kPer>(from, p.dim, false, query[h]);
#pragma unroll
    for (int i = 0; i < kPer; ++i) query[h][i] *= p.scale;
    highest[h] = -INFINITY;
  }

  for (int j = begin + warp * kKeys; j < end; j += kWarps * kKeys) {
    float key[kKeys][kPer], value[kKeys][kPer];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {  // beyond the end the last key again, with no weight
      const int at = min(j + k, end - 1);
      Load<T, kPer>(At<T>(p, row, kv_head, at, false), p.dim, p.whole_vectors, key[k]);
      Load<T, kPer>(At<T>(p, row, kv_head, at, true), p.dim, p.whole_vectors, value[k]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float score[kKeys], most = highest[h];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        score[k] = Cap(Dot<kPer>(query[h], key[k]), p.softcap);
        if (j + k >= end) score[k] = -INFINITY;
        if (kObserve && lane == 0 && h < heads && j + k < end) {
          Scores(p, blockIdx.x, first_head + h)[j + k - row.first] = score[k];
        }
        most = fmaxf(most, score[k]);
      }
      const float rescale = expf(highest[h] - most);
      highest[h] = most;
      total[h] *= rescale;
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum[h][i] *= rescale;
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const float weight = expf(score[k] - most);
        total[h] += weight;
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum[h][i] = fmaf(weight, value[k][i], sum[h][i]);
      }
    }
  }

  // The block's warps, merged in order.
  __shared__ float sums[kWarps][kWarp * kPer], tops[kWarps], totals[kWarps];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) sums[warp][lane * kPer + i] = sum[h][i];
    if (lane == 0) tops[warp] = highest[h], totals[warp] = total[h];
    __syncthreads();
    if (h < heads) {
      float top = tops[0];
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w]);
      float* to = PartialsOf(p, blockIdx.x, first_head + h).first + split * PartialStride(p.dim);
      for (int d = threadIdx.x; d < p.dim; d += kWarps * kWarp) {
        float all = 0;
        for (int w = 0; w < kWarps; ++w) all += expf(tops[w] - top) * sums[w][d];
        to[d] = all;
      }
      if (threadIdx.x == 0) {
        float all = 0;
        for (int w = 0; w < kWarps; ++w) all += expf(tops[w] - top) * totals[w];
        to[p.dim] = top;
        to[p.dim + 1] = all;
      }
    }
    __syncthreads();
  }
}

// grid: rows, heads, parts of a head's channels. Threads take four channels each and, side by side,
// every so many partial results.
__global__ void __launch_bounds__(kMergeThreads) Merge(const Piece p) {
  const int row_index = p.first_row + blockIdx.x, head = blockIdx.y;
  const int fours = (p.dim + 4 * gridDim.z - 1) / (4 * gridDim.z), sides = kMergeThreads / fours;
  const int side = threadIdx.x / fours, d = (blockIdx.z * fours + threadIdx.x % fours) * 4;
  if (p.scores == nullptr || p.late) LetNextBegin();
  AwaitEarlier();
  LetNextBegin();  // ObserveSpans, which needs the partial results but not this
  if (p.out == nullptr) return;

  const PartialRange parts = PartialsOf(p, blockIdx.x, head);
  constexpr int kAhead = 8;  // loads of a thread that do not wait for the highest
  float4 ahead[kAhead];
  float tops[kAhead];
  const int first = side < sides && d < p.dim ? side : parts.count;
  const auto Fetch = [&](int begin) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = begin + k * sides;
      const bool is = i < parts.count;
      ahead[k] =
          is ? *reinterpret_cast<const float4*>(parts.first + i * parts.stride + d) : float4{};
      tops[k] = is ? parts.first[i * parts.stride + p.dim] : -INFINITY;
    }
  };
  Fetch(first);

  const Softmax softmax = SoftmaxOf(p, parts, head);
  float4 sum = {};
  const auto Add = [&](float factor, const float4& v) {
    sum.x = fmaf(factor, v.x, sum.x);
    sum.y = fmaf(factor, v.y, sum.y);
    sum.z = fmaf(factor, v.z, sum.z);
    sum.w = fmaf(factor, v.w, sum.w);
  };
  for (int i = first; i < parts.count; i += kAhead * sides) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) Add(expf(tops[k] - softmax.highest), ahead[k]);
    Fetch(i + kAhead * sides);
  }
  __shared__ float4 sums[kMergeThreads];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (side != 0) return;
  for (int i = 1; i < sides; ++i) Add(1, sums[i * fours + threadIdx.x]);
  const float values[4] = {sum.x, sum.y, sum.z, sum.w};
  const int64_t at = row_index * p.out_row + head * p.out_head + d;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (d + i < p.dim) StoreOut<1>(p, at + i, {values[i] / softmax.total});
  }
}

template <class T, int kPer, bool kObserve>
void LaunchPartial(BackendContext& context, const Piece& p) {
  const auto Run = [&](auto kernel, int heads) {
    const int groups = (p.group + heads - 1) / heads;
    const dim3 grid(p.rows, p.cache.kv_heads * groups, MostSplits(p));
    kernel<<<grid, kWarps * kWarp, 0, context.stream>>>(p);
  };
  if (p.group == 1) {
    Run(Partial<T, kPer, 1, kObserve>, 1);
  } else if (p.group == 2) {
    Run(Partial<T, kPer, 2, kObserve>, 2);
  } else {
    Run(Partial<T, kPer, 4, kObserve>, 4);
  }
}

// Rows one by one, in as many pieces as the workspace asks for.
template <class T, int kPer>
class RowByRow {
 public:
  RowByRow(BackendContext& context, const AttentionArgs& a, const Problem& problem)
      : context_(context), spans_(a.spans), piece_{problem} {
    piece_.parts = AttendsInClusters(context, problem) ? Parts::kWhole
                   : AttendsInShares(problem)          ? Parts::kShares
                                                       : Parts::kSplits;
    // In floats; whole vectors of four.
    const auto partial = static_cast<size_t>(PartialStride(problem.dim));
    size_t partials_of_row = problem.heads * partial, others = 0;
    most_ = a.batch.rows;
    if (piece_.parts == Parts::kSplits) partials_of_row *= kMaxSplits;
    if (piece_.parts == Parts::kShares) {
      const size_t of_strand = HeadsOfStrand(problem) * partial;
      piece_.most_shares = MostShares(context, problem);
      partials_of_row = StrandsOfRow(problem) * of_strand;
      others = piece_.most_shares * of_strand + kMostShareRows + 1;
      most_ = std::min(most_, kMostShareRows);
    }
    if (spans_.count > 0) piece_.score_stride = (MostKeys(problem) + 3) / 4 * 4;
    const size_t scores_of_row = problem.heads * piece_.score_stride;
    const size_t of_row = partials_of_row + scores_of_row;
    constexpr size_t kMost = BackendContext::kWorkspaceBytes / sizeof(float);
    CHECK_LE(of_row + others, kMost);
    most_ = static_cast<int>(std::min<size_t>(most_, (kMost - others) / of_row));
    const size_t bytes = sizeof(float) * (most_ * of_row + others);
    if (spans_.count > 0 && piece_.parts != Parts::kSplits && most_ == a.batch.rows) {
      scores_ = static_cast<float*>(TakeLate(context, bytes));
    }
    piece_.late = scores_ != nullptr;
    if (!piece_.late) scores_ = static_cast<float*>(context.Workspace(bytes));
    piece_.partial = scores_ + most_ * scores_of_row;
    piece_.steps_before =
        reinterpret_cast<int*>(scores_ + most_ * of_row + others) - (kMostShareRows + 1);
  }

  void Run(int begin, int end) {
    for (; begin < end; begin += most_) RunPiece(begin, std::min(most_, end - begin));
  }
  // Makes the records of observed rows, and nothing else.
  void Observe(int begin, int end) {
    piece_.out = nullptr;
    const int32_t* rows = spans_.HostRows();
    const int end_observed = FirstObserved(end);
    for (int i = FirstObserved(begin); i < end_observed;) {
      int next = i + 1;  // rows that follow each other go together
      while (next < end_observed && next - i < most_ && rows[next] == rows[i] + next - i) ++next;
      RunPiece(rows[i], next - i);
      i = next;
    }
  }

 private:
  int FirstObserved(int row) const {
    if (spans_.count == 0) return 0;
    const int32_t* rows = spans_.HostRows();
    return static_cast<int>(std::lower_bound(rows, rows + spans_.count, row) - rows);
  }

  void RunPiece(int first_row, int rows) {
    Piece p = piece_;
    p.first_row = first_row;
    p.rows = rows;
    p.first_observed = FirstObserved(first_row);
    const int observed = FirstObserved(first_row + rows) - p.first_observed;
    if (p.late) CHECK(!std::exchange(used_, true)) << "a graph's rows are observed at once";
    if (observed > 0) p.scores = scores_;
    switch (p.parts) {
      case Parts::kWhole:
        AttendClusters(context_, p);
        break;
      case Parts::kShares:
        AttendShares(context_, p);
        break;
      case Parts::kSplits:
        (observed > 0 ? LaunchPartial<T, kPer, true> : LaunchPartial<T, kPer, false>)(context_, p);
        break;
    }
    if (p.parts != Parts::kWhole) {
      const int slices = rows * p.heads < context_.sm_count ? (p.dim + 63) / 64 : 1;
      LaunchEarly(context_, Merge, dim3(rows, p.heads, slices), kMergeThreads, p);
    }
    if (observed > 0) ObserveSpans(context_, p, observed);
  }

  BackendContext& context_;
  const SpanRequest& spans_;
  Piece piece_;
  int most_;  // rows of a piece
  float* scores_ = nullptr;
  bool used_ = false;
};

template <class T, int kPer>
void Run(BackendContext& context, const AttentionArgs& a, const Problem& p) {
  RowByRow<T, kPer> row_by_row(context, a, p);
  const int32_t* begin = a.batch.HostRowBegin();
  const bool tiles = AttendsInTiles(p);
  const auto Tiled = [&](int s) { return tiles && begin[s + 1] - begin[s] >= p.tile_rows; };
  bool any_tiled = false;
  for (int s = 0; s < a.batch.sequences;) {
    if (Tiled(s)) {
      any_tiled = true;
      ++s;
      continue;
    }
    const int first = begin[s];
    while (s < a.batch.sequences && !Tiled(s)) ++s;
    row_by_row.Run(first, begin[s]);
  }
  if (!any_tiled) return;
  (AttendsInWgmma(context, p) ? AttendWgmma : AttendTiles)(context, p);
  for (int s = 0; s < a.batch.sequences;) {
    const int first = begin[s];
    for (; s < a.batch.sequences && Tiled(s); ++s) {
    }
    row_by_row.Observe(first, begin[s]);
    for (; s < a.batch.sequences && !Tiled(s); ++s) {
    }
  }
}

template <class T>
void RunFor(BackendContext& context, const AttentionArgs& a, const Problem& p) {
  VisitHeadSize(p, [&](auto size) { Run<T, size / kWarp>(context, a, p); });
}

}  // namespace

void Attention(BackendContext& context, const AttentionArgs& a) {
  if (a.batch.rows == 0) return;
  Problem p = {};
  p.query = a.query.as<const float>();
  p.key = a.key.data;
  p.value = a.value.data;
  p.out = a.out.data;
  p.query_row = a.query.stride[0];
  p.query_head = a.query.stride[1];
  p.key_row = a.key.stride[0];
  p.key_head = a.key.stride[1];
  p.value_row = a.value.stride[0];
  p.value_head = a.value.stride[1];
  p.out_row = a.out.stride[0];
  p.out_head = a.out.stride[1];
  p.sinks = a.sinks.empty() ? nullptr : a.sinks.as<const float>();
  p.cache = a.cache;
  p.batch = a.batch;
  p.spans = a.spans;
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.window = a.window;
  p.heads = static_cast<int>(a.query.shape[1]);
  p.dim = static_cast<int>(a.query.shape[2]);
  p.group = p.heads / a.cache.kv_heads;
  p.half_out = a.out.dtype == DType::kBF16;
  p.tile_rows = context.deterministic ? 1 : kTileRows;
  CHECK_LE(p.dim, 256);
  CHECK_EQ(p.heads % a.cache.kv_heads, 0);
  CHECK(p.half_out || a.out.dtype == DType::kF32) << Info(a.out.dtype).name;
  CHECK(a.key.dtype == a.cache.dtype && a.value.dtype == a.cache.dtype);
  // Every row of keys begins at a multiple of the widest vector (8 elements) if these do.
  p.whole_vectors = true;
  for (int64_t n : {int64_t{p.dim}, p.key_row, p.key_head, p.value_row, p.value_head,
                    a.cache.key_offset / 2, a.cache.value_offset / 2}) {
    p.whole_vectors = p.whole_vectors && n % 8 == 0;
  }
  switch (a.cache.dtype) {
    case DType::kF32:
      RunFor<float>(context, a, p);
      break;
    case DType::kBF16:
      RunFor<__nv_bfloat16>(context, a, p);
      break;
    default:
      CHECK(false) << Info(a.cache.dtype).name << " is not a cache type";
  }
  CheckLaunch(context, "Attention");
}

}  // namespace longspan::cuda
