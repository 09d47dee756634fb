// Partial results of rows over bf16 keys and values, as fast as memory gives them.
//
// One block a multiprocessor, and each warp for itself: the steps of all rows and KV heads, one
// after another, are cut into even shares, a warp's each, however rows differ in length. A warp
// copies its share's keys and values through a ring of its own; the copies run on from one strand
// into the next. (That a block's warps take the next step of its share in turn, each when it has
// room for one, is slower: 8 x 32K, heads of 256, on an H100 2.86 -> 2.75 TB/s.)
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/attention_steps.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {
namespace {

// What one warp copies to and computes from.
template <int kDim>
struct alignas(128) Ring {
  static constexpr int kWarps = kDim > 128 ? 8 : 12;  // of a block: what registers allow
  // One more is slower: what is under way is waited for by what a warp asks for last, its queries
  // and the page table. On an H100, us an op: 32 x 2K, heads of 256, 101.7 -> 99.6; 1 x 32K, heads
  // of 128, 53.4 -> 52.9.
  static constexpr int kStages = kDim > 128 ? 2 : 3;

  Bf16 stages[kStages][kStep][kDim];
  Item items[kStages];  // of the stages, and the one after them
};

// Where a step of the launch is: in which strand, and the how manieth of it.
struct Place {
  int row, strand, step;
};
__device__ __forceinline__ Place Find(const Piece& p, const int* steps_before, int64_t step) {
  const int strands = StrandsOfRow(p), of_rows = static_cast<int>(step / strands);
  int row = 0, end = p.rows;  // the row is the last with no more steps before it
  while (end - row > 1) {
    const int middle = (row + end) / 2;
    (steps_before[middle] <= of_rows ? row : end) = middle;
  }
  const auto of_row = static_cast<int>(step - int64_t{steps_before[row]} * strands);
  const int of_strand = steps_before[row + 1] - steps_before[row];
  return {row, of_row / of_strand, of_row % of_strand};
}

// Copies the stages of a warp's items, one after another, each item's as keys, values, keys, values
// and so on.
template <int kDim>
class Reader {
 public:
  // Of `steps` steps of the launch from `begin` on; steps_before: as Piece has it.
  __device__ Reader(const Piece& p, const int* steps_before, const Place& begin, int steps,
                    Ring<kDim>& ring)
      : p_(p), steps_before_(steps_before), ring_(ring), copier_(p), next_(begin), left_(steps) {
    Open();
  }

  // The first stages are all of the first item, and from the cache.
  __device__ __forceinline__ bool FillsFromCache() const {
    return copier_.Cached((Ring<kDim>::kStages + 1) / 2);
  }

  // The next stage comes to `to`; behind the last, nothing.
  template <bool kValues>
  __device__ __forceinline__ void Fetch(uint32_t to) {
    copier_.template Copy<kValues>(to);
    if (!kValues || copier_.AtEnd()) return;
    copier_.Advance();
    if (copier_.AtEnd()) Open();
  }

 private:
  // Begins with what the share has of the next strand.
  __device__ void Open() {
    Item& item = ring_.items[opened_];
    if (++opened_ == Ring<kDim>::kStages) opened_ = 0;
    if (left_ == 0) {
      item.begin = item.end = 0;
      return;
    }
    const int of_strand = steps_before_[next_.row + 1] - steps_before_[next_.row];
    const int steps = min(left_, of_strand - next_.step);
    const Row row(p_, p_.first_row + next_.row);
    const Strand strand(p_, next_.strand);
    const int begin = row.first + next_.step * kStep;
    item = {next_.row,
            next_.strand,
            row.first,
            strand.first_head,
            strand.heads,
            begin,
            min(begin + steps * kStep, row.position + 1)};
    copier_.Seek(row, strand.kv_head, begin, item.end);
    left_ -= steps;
    next_.step = 0;
    if (++next_.strand == StrandsOfRow(p_)) next_.strand = 0, ++next_.row;
  }

  const Piece& p_;
  const int* steps_before_;
  Ring<kDim>& ring_;
  StepCopier<kDim> copier_;
  Place next_;      // where the next item begins
  int left_;        // steps
  int opened_ = 0;  // of the ring's items
};

// Steps of the rows before each, by all threads of the block.
__device__ void CountSteps(const Piece& p, int* steps_before) {
  for (int r = threadIdx.x; r < p.rows; r += blockDim.x) {
    const Row row(p, p.first_row + r);
    steps_before[r + 1] = (row.position - row.first) / kStep + 1;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    int before = 0;
    for (int r = 0; r < p.rows; r += kWarp) {
      const int lane = threadIdx.x, at = r + lane + 1;
      int through = at <= p.rows ? steps_before[at] : 0;
#pragma unroll
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const int other = __shfl_up_sync(~0u, through, offset);
        if (lane >= offset) through += other;
      }
      through += before;
      before = __shfl_sync(~0u, through, kWarp - 1);
      if (at <= p.rows) steps_before[at] = through;
    }
    if (threadIdx.x == 0) steps_before[0] = 0;
  }
  __syncthreads();
}

// A share, by a warp.
template <int kDim, bool kObserve>
__device__ __forceinline__ void AttendShare(const Piece& p, const int* steps_before,
                                            const Shares& shares, int share, Ring<kDim>& ring) {
  constexpr int kStages = Ring<kDim>::kStages;
  constexpr uint32_t kStageBytes = sizeof ring.stages[0];
  const int64_t begin = shares.Begin(share), end = shares.Begin(share + 1);
  Reader<kDim> reader(p, steps_before, Find(p, steps_before, begin), static_cast<int>(end - begin),
                      ring);
  __syncwarp();
  Item item = ring.items[0];
  const uint32_t stages = Shared(ring.stages);
  if (!reader.FillsFromCache()) AwaitEarlier();
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) {
    if (s % 2 == 0) {
      reader.template Fetch<false>(stages + s * kStageBytes);
    } else {
      reader.template Fetch<true>(stages + s * kStageBytes);
    }
  }
  AwaitEarlier();

  int stage = 0, taken = 0;
  const auto AwaitStage = [&] {
    Await<kStages - 1>();
    __syncwarp();
    return stages + stage * kStageBytes;
  };
  const auto Refill = [&](uint32_t at, auto values) {
    __syncwarp();
    reader.template Fetch<decltype(values)::value>(at);
    if (++stage == kStages) stage = 0;
  };
  const int lane = threadIdx.x % kWarp, stride = PartialStride(p.dim);
  for (;;) {
    WarpAttention<kDim> warp_attention(p, item);
    for (int j = item.begin; j < item.end; j += kStep) {
      const uint32_t keys = AwaitStage();
      const StepScores scores = warp_attention.Score(keys);
      Refill(keys, std::bool_constant<kStages % 2 == 1>{});
      warp_attention.template Weigh<kObserve>(p, item, j, scores);
      const uint32_t values = AwaitStage();
      warp_attention.AddValues(values);
      Refill(values, std::bool_constant<kStages % 2 == 0>{});
    }
    warp_attention.AddLanes();
    const int64_t number = int64_t{item.row} * StrandsOfRow(p) + item.strand + share;
    float* partial = p.partial + number * HeadsOfStrand(p) * stride;
    if (lane % 4 == 0 && lane / 4 < item.heads) {
      partial[lane / 4 * stride + p.dim] = warp_attention.highest;
      partial[lane / 4 * stride + p.dim + 1] = warp_attention.total;
    }
    warp_attention.VisitSums([&](int head, int d, float sum) {
      if (head < item.heads && d < p.dim) partial[head * stride + d] = sum;
    });
    if (++taken == kStages) taken = 0;
    __syncwarp();
    item = ring.items[taken];
    if (item.begin == item.end) break;
  }
}

// grid: up to a block a multiprocessor.
template <int kDim, bool kObserve>
__global__ void __launch_bounds__(Ring<kDim>::kWarps* kWarp, 1)
    Attend(const __grid_constant__ Piece p) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ int steps_before[kMostShareRows + 1];
  LetNextBegin();
  CountSteps(p, steps_before);
  const Shares shares(p, steps_before[p.rows]);
  const int warp = threadIdx.x / kWarp, share = warp * gridDim.x + blockIdx.x;
  if (share < shares.count) {
    AttendShare<kDim, kObserve>(p, steps_before, shares, share,
                                reinterpret_cast<Ring<kDim>*>(memory)[warp]);
  }
  if (blockIdx.x > 0) return;
  AwaitEarlier();  // which may have had use for that memory
  for (int r = threadIdx.x; r <= p.rows; r += blockDim.x) p.steps_before[r] = steps_before[r];
}

template <int kDim>
int WarpsOfBlock(const BackendContext& context) {
  constexpr int kOthers = 8192;  // bytes of shared memory besides: the steps before rows
  constexpr int kBytes = static_cast<int>(sizeof(Ring<kDim>));
  return std::min(Ring<kDim>::kWarps, (context.max_shared_bytes - kOthers) / kBytes);
}

template <int kDim>
void Launch(BackendContext& context, const Piece& p) {
  const int warps = WarpsOfBlock<kDim>(context);
  const int bytes = warps * static_cast<int>(sizeof(Ring<kDim>));
  const auto kernel = p.scores != nullptr ? Attend<kDim, true> : Attend<kDim, false>;
  Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
     "Attention");
  LaunchEarlyWith(context, {.shared_bytes = bytes}, kernel, dim3(context.sm_count), warps * kWarp,
                  p);
}

}  // namespace

bool AttendsInShares(const Problem& p) { return p.cache.dtype == DType::kBF16 && p.whole_vectors; }

int MostShares(const BackendContext& context, const Problem& p) {
  int warps = 0;
  VisitHeadSize(p, [&](auto size) { warps = WarpsOfBlock<size>(context); });
  return warps * context.sm_count;
}

void AttendShares(BackendContext& context, const Piece& p) {
  CHECK_LE(p.rows, kMostShareRows);
  CheckQueries(p);
  VisitHeadSize(p, [&](auto size) { Launch<size>(context, p); });
}

}  // namespace longspan::cuda
