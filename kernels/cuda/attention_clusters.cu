// Attention of rows that see few keys, to its end in one kernel: a cluster of blocks takes a row's
// splits for the query heads of a KV head, a block each, its warps the split's steps in turn;
// blocks then merge what lies in each other's shared memory. How a row is cut follows from the
// number of keys it sees alone.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_steps.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/clusters.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {
namespace {

constexpr int kMostBlocks = 8;  // of a cluster, on every device
constexpr int kWarps = 4;       // of a block
constexpr int kStepsOfWarp = kSplitKeys / kStep / kWarps;

// Of a block or a warp, for each head: the highest score, and the total of exp(score - highest).
struct Totals {
  float highest[kHeads], total[kHeads];
};

template <int kDim>
struct Memory {
  union {
    Bf16 stages[kWarps][2][kStep][kDim];   // a warp's keys and its values
    float sums[kWarps][kHeads][kDim + 4];  // so that a warp's heads lie in banks of their own
  };
  float merged[kHeads][kDim];  // of the block
  Totals of_warps[kWarps], of_block;
};

__device__ __forceinline__ float Factor(float highest, float top) {
  return highest == -INFINITY ? 0.0f : __expf(highest - top);
}

// Copies a warp's steps of a block's item. Lane l knows where row l % kStep of each lies, of them
// all from the start: half of the lanes of the keys, half of the values.
template <int kDim>
struct ItemCopier {
  const Piece& p;
  const Item& item;
  uintptr_t from[kStepsOfWarp];

  __device__ __forceinline__ ItemCopier(const Piece& piece, const Item& of, const Row& row,
                                        int kv_head)
      : p(piece), item(of) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int s = 0; s < kStepsOfWarp; ++s) {
      const int j = min(Begin(s) + lane % kStep, item.end - 1);
      from[s] = item.begin == item.end
                    ? 0
                    : reinterpret_cast<uintptr_t>(At<Bf16>(p, row.sequence, row.start, row.flight,
                                                           kv_head, j, lane >= kStep));
    }
  }
  __device__ __forceinline__ int Begin(int s) const {
    return item.begin + (threadIdx.x / kWarp + s * kWarps) * kStep;
  }
  template <bool kValues>
  __device__ __forceinline__ void Copy(int s, uint32_t to) const {
    constexpr int kVectors = kDim / kVector, kRows = kWarp / kVectors;  // of one instruction
    const int lane = threadIdx.x % kWarp, vector = lane % kVectors;
    if (s < kStepsOfWarp && Begin(s) < item.end) {
#pragma unroll
      for (int i = 0; i < kStep; i += kRows) {
        const int row = i + lane / kVectors;
        const uintptr_t at = __shfl_sync(~0u, from[s], kValues * kStep + row);
        CopyAsync(to + PlaceInStage<kDim>(row, vector), reinterpret_cast<const uint4*>(at) + vector,
                  vector * kVector < p.dim);
      }
    }
    Commit();
  }
};

// grid: splits, which are a cluster; strands of a row; rows.
template <int kDim, bool kObserve>
__global__ void __launch_bounds__(kWarps* kWarp) AttendCluster(const __grid_constant__ Piece p) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Memory<kDim>*>(memory);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  LetNextBegin();
  const int split = RankInCluster();
  const Strand strand(p, blockIdx.y);
  const Row row(p, p.first_row + blockIdx.z);
  Item item = {static_cast<int>(blockIdx.z),
               static_cast<int>(blockIdx.y),
               row.first,
               strand.first_head,
               strand.heads,
               row.first + split * row.chunk,
               0};
  item.end = max(item.begin, min(item.begin + row.chunk, row.position + 1));
  const ItemCopier<kDim> copier(p, item, row, strand.kv_head);
  const uint32_t keys = Shared(shared.stages[warp][0]), values = Shared(shared.stages[warp][1]);
  // Cached keys are older than the kernels that are under way.
  const bool cached = item.end <= row.start;
  if (!cached) AwaitEarlier();
  copier.template Copy<false>(0, keys);
  copier.template Copy<true>(0, values);
  if (cached) AwaitEarlier();

  WarpAttention<kDim> attention(p, item);
#pragma unroll
  for (int s = 0; s < kStepsOfWarp; ++s) {
    Await<1>();
    __syncwarp();
    if (copier.Begin(s) < item.end) {
      const StepScores scores = attention.Score(keys);
      __syncwarp();
      copier.template Copy<false>(s + 1, keys);
      attention.template Weigh<kObserve>(p, item, copier.Begin(s), scores);
      Await<1>();
      __syncwarp();
      attention.AddValues(values);
      __syncwarp();
      copier.template Copy<true>(s + 1, values);
    }
  }
  attention.AddLanes();

  // The block's warps.
  if (lane % 4 == 0) {
    shared.of_warps[warp].highest[lane / 4] = attention.highest;
    shared.of_warps[warp].total[lane / 4] = attention.total;
  }
  __syncthreads();
  float top = -INFINITY, total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, shared.of_warps[w].highest[lane / 4]);
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total += shared.of_warps[w].total[lane / 4] * Factor(shared.of_warps[w].highest[lane / 4], top);
  }
  attention.Rescale(Factor(attention.highest, top));
  attention.VisitSums([&](int head, int d, float sum) {
    if (head < item.heads) shared.sums[warp][head][d] = sum;
  });
  if (warp == 0 && lane % 4 == 0) {
    shared.of_block.highest[lane / 4] = top;
    shared.of_block.total[lane / 4] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < item.heads * kDim; i += kWarps * kWarp) {
    const int head = i / kDim, d = i % kDim;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][head][d];
    shared.merged[head][d] = sum;
  }
  SyncCluster();

  // The cluster's blocks, each for some channels.
  const int blocks = BlocksOfCluster(), each = kDim / blocks;
  for (int i = threadIdx.x; i < item.heads * each; i += kWarps * kWarp) {
    const int head = i / each, d = split * each + i % each;
    const float sink = p.sinks != nullptr ? p.sinks[item.first_head + head] : -INFINITY;
    float highest[kMostBlocks], totals[kMostBlocks], sums[kMostBlocks], most = sink;
#pragma unroll
    for (int b = 0; b < kMostBlocks; ++b) {
      const bool is = b < blocks;
      highest[b] = is ? LoadOfBlock(&shared.of_block.highest[head], b) : -INFINITY;
      totals[b] = is ? LoadOfBlock(&shared.of_block.total[head], b) : 0;
      sums[b] = is ? LoadOfBlock(&shared.merged[head][d], b) : 0;
      most = fmaxf(most, highest[b]);
    }
    float all = 0, sum = 0;
#pragma unroll
    for (int b = 0; b < kMostBlocks; ++b) {
      const float factor = Factor(highest[b], most);
      all += factor * totals[b];
      sum += factor * sums[b];
    }
    if (kObserve && d == 0) {
      float* to = PartialsOf(p, item.row, item.first_head + head).first + p.dim;
      to[0] = most;
      to[1] = all;
    }
    if (d < p.dim && p.out != nullptr) {
      const int64_t at =
          (p.first_row + item.row) * p.out_row + (item.first_head + head) * p.out_head + d;
      StoreOut<1>(p, at, {sum / (all + Factor(sink, most))});
    }
  }
  SyncCluster();  // the others have read
}

template <int kDim>
void Launch(BackendContext& context, const Piece& p) {
  const auto kernel = p.scores != nullptr ? AttendCluster<kDim, true> : AttendCluster<kDim, false>;
  constexpr int kBytes = static_cast<int>(sizeof(Memory<kDim>));
  Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
     "Attention");
  int blocks = 1;
  while (blocks < MostSplits(p)) blocks *= 2;
  LaunchEarlyWith(context, {.shared_bytes = kBytes, .cluster = blocks}, kernel,
                  dim3(blocks, StrandsOfRow(p), p.rows), kWarps * kWarp, p);
}

}  // namespace

bool AttendsInClusters(const BackendContext& context, const Problem& p) {
  return context.compute_capability >= 90 && AttendsInShares(p) && MostSplits(p) <= kMostBlocks;
}

void AttendClusters(BackendContext& context, const Piece& p) {
  CheckQueries(p);
  VisitHeadSize(p, [&](auto size) { Launch<size>(context, p); });
}

}  // namespace longspan::cuda
