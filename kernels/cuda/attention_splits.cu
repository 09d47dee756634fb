// Partial results of rows' splits from bf16 keys and values, as fast as memory gives them.
//
// One block a multiprocessor, and each warp for itself: it takes items (one split of one row, for
// up to kHeads query heads of a KV head) in turn and copies their keys and values through a ring of
// its own. The copies run on into its next item, so memory does not wait for the end of one.
// Splits follow from a row's own length: whichever warp takes one finds the same numbers.
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
  static constexpr int kStages = kDim > 128 ? 3 : 4;

  Bf16 stages[kStages][kStep][kDim];
  Item items[kStages];  // of the stages, and the one after them
};

// Copies the stages of a warp's items, one after another, each item's as keys, values, keys, values
// and so on. Lane l knows where row l % kStep of the next ones lies: half of the lanes of the keys,
// half of the values.
template <int kDim>
class Reader {
 public:
  // `next`: how many items the block's warps have taken.
  __device__ Reader(const Piece& p, int rows, Ring<kDim>& ring, int& next)
      : p_(p), rows_(rows), ring_(ring), next_(next) {
    CountSplits();
    Open();
  }

  // The next stage comes to `to`; behind the last, nothing. Vector v of row r lies where v ^ r % 8
  // would, so that neither copies nor ldmatrix meet a bank twice.
  template <bool kValues>
  __device__ __forceinline__ void Fetch(uint32_t to) {
    if (j_ < end_) {
      constexpr int kVectors = kDim / kVector, kRows = kWarp / kVectors;  // of one instruction
      const int lane = threadIdx.x % kWarp, row = lane / kVectors, vector = lane % kVectors;
      const auto from = reinterpret_cast<uintptr_t>(base_ + kPageUnitBytes * unit_);
      const int last = min(kStep, end_ - j_) - 1;  // of rows; it stands for those behind it
      to += row * kDim * sizeof(Bf16) + (vector ^ row) * sizeof(uint4);
#pragma unroll
      for (int i = 0; i < kStep; i += kRows) {
        const uintptr_t at = __shfl_sync(~0u, from, kValues * kStep + min(i + row, last));
        CopyAsync((to ^ (i % 8 * sizeof(uint4))) + i * kDim * sizeof(Bf16),
                  reinterpret_cast<const uint4*>(at) + vector, vector * kVector < p_.dim);
      }
      if (kValues) Advance();
    }
    Commit();
  }

 private:
  // Splits of the rows from first_row_ on: a lane knows its row's and those up to it.
  __device__ void CountSplits() {
    const int lane = threadIdx.x % kWarp;
    splits_ = first_row_ + lane < rows_ ? Row(p_, p_.first_row + first_row_ + lane).splits : 0;
    through_ = splits_;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int other = __shfl_up_sync(~0u, through_, offset);
      if (lane >= offset) through_ += other;
    }
  }
  // Takes the next item: those of the launch are split after split, row after row, and each block
  // has every so many of them.
  __device__ void Open() {
    const int lane = threadIdx.x % kWarp;
    int item = lane == 0 ? atomicAdd(&next_, 1) : 0;
    item = __shfl_sync(~0u, item, 0) * gridDim.x + blockIdx.x;
    const int groups = HeadGroups(p_), parts = p_.cache.kv_heads * groups;
    const int part = item % parts, wanted = item / parts;
    Item& opened = ring_.items[opened_];
    if (++opened_ == Ring<kDim>::kStages) opened_ = 0;
    for (;;) {
      const int all = __shfl_sync(~0u, through_, kWarp - 1);
      if (wanted < before_ + all) break;
      before_ += all;
      first_row_ += kWarp;
      if (first_row_ >= rows_) {
        opened.begin = opened.end = j_ = end_ = 0;
        return;
      }
      CountSplits();
    }
    const int at = __ffs(__ballot_sync(~0u, wanted < before_ + through_)) - 1;
    const int split = wanted - before_ - __shfl_sync(~0u, through_ - splits_, at);
    const Row row(p_, p_.first_row + first_row_ + at);
    kv_head_ = part / groups;
    const int first_head = kv_head_ * p_.group + part % groups * kHeads;
    j_ = row.first + split * row.chunk;
    end_ = min(j_ + row.chunk, row.position + 1);
    opened = {first_row_ + at,
              row.first,
              split,
              first_head,
              min(kHeads, (kv_head_ + 1) * p_.group - first_head),
              j_,
              end_};
    sequence_ = row.sequence;
    start_ = row.start;
    flight_ = row.flight;
    const int j = j_ + lane % kStep;
    slot_ = j / p_.cache.page_tokens;
    in_page_ = j - slot_ * p_.cache.page_tokens;
    slot_ %= p_.cache.slots;
    Locate();
  }
  __device__ void Advance() {
    j_ += kStep;
    if (j_ >= end_) return Open();
    in_page_ += kStep;
    while (in_page_ >= p_.cache.page_tokens) {
      in_page_ -= p_.cache.page_tokens;
      if (++slot_ == p_.cache.slots) slot_ = 0;
    }
    Locate();
  }
  // The table's entry is asked for a stage before it is used.
  __device__ void Locate() {
    const int j = j_ + threadIdx.x % kStep;
    const bool values = threadIdx.x % kWarp >= kStep;
    unit_ = 0;
    if (j >= start_) {
      const int64_t r = flight_ + j - start_;
      base_ = static_cast<const std::byte*>(values ? p_.value : p_.key) +
              sizeof(Bf16) * (values ? r * p_.value_row + kv_head_ * p_.value_head
                                     : r * p_.key_row + kv_head_ * p_.key_head);
      return;
    }
    base_ = p_.cache.arena + (values ? p_.cache.value_offset : p_.cache.key_offset) +
            sizeof(Bf16) * (int64_t{kv_head_} * p_.cache.page_tokens + in_page_) * p_.dim;
    if (j < end_) unit_ = p_.cache.table[sequence_ * p_.cache.table_stride + slot_];
  }

  const Piece& p_;
  const int rows_;
  Ring<kDim>& ring_;
  int& next_;
  int opened_ = 0, first_row_ = 0, before_ = 0, splits_, through_;
  int j_, end_;  // of the item: the next stages' first key, and where keys end
  int sequence_, start_, flight_, kv_head_, slot_, in_page_;
  const std::byte* base_;
  int32_t unit_;
};

// grid: up to a block a multiprocessor.
template <int kDim, bool kObserve>
__global__ void __launch_bounds__(Ring<kDim>::kWarps* kWarp, 1) Split(const Piece p, int rows) {
  constexpr int kStages = Ring<kDim>::kStages;
  extern __shared__ __align__(128) unsigned char memory[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  Ring<kDim>& ring = reinterpret_cast<Ring<kDim>*>(memory)[warp];
  __shared__ int next;
  if (threadIdx.x == 0) next = 0;
  __syncthreads();
  LetNextBegin();

  Reader<kDim> reader(p, rows, ring, next);
  AwaitEarlier();
  constexpr uint32_t kStageBytes = sizeof ring.stages[0];
  const uint32_t stages = Shared(ring.stages);
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) {
    if (s % 2 == 0) {
      reader.template Fetch<false>(stages + s * kStageBytes);
    } else {
      reader.template Fetch<true>(stages + s * kStageBytes);
    }
  }
  int stage = 0;
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
  for (int taken = 0;; taken = taken == kStages - 1 ? 0 : taken + 1) {
    __syncwarp();
    const Item item = ring.items[taken];
    if (item.begin == item.end) break;
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
    if (lane % 4 == 0 && lane / 4 < item.heads) {
      float* to = Partials(p, item.row, item.first_head + lane / 4, item.split);
      to[p.dim] = warp_attention.highest;
      to[p.dim + 1] = warp_attention.total;
    }
    warp_attention.VisitSums([&](int head, int d, float sum) {
      if (head < item.heads && d < p.dim) {
        Partials(p, item.row, item.first_head + head, item.split)[d] = sum;
      }
    });
  }
}

template <int kDim>
void Launch(BackendContext& context, const Piece& p, int rows) {
  constexpr int kBytes = static_cast<int>(sizeof(Ring<kDim>));
  constexpr int kOthers = 128;  // bytes of shared memory besides
  const int warps = std::min(Ring<kDim>::kWarps, (context.max_shared_bytes - kOthers) / kBytes);
  const auto kernel = p.scores != nullptr ? Split<kDim, true> : Split<kDim, false>;
  Ok(context,
     cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, warps * kBytes),
     "Attention");
  const int64_t items = int64_t{rows} * p.cache.kv_heads * HeadGroups(p) * MostSplits(p);
  const int blocks = static_cast<int>(std::min<int64_t>(context.sm_count, items));
  LaunchEarlyWith(context, {.shared_bytes = warps * kBytes}, kernel, dim3(blocks), warps * kWarp, p,
                  rows);
}

}  // namespace

bool SplitsInVectors(const Problem& p) { return p.cache.dtype == DType::kBF16 && p.whole_vectors; }

void AttendSplits(BackendContext& context, const Piece& p, int rows) {
  CheckQueries(p);
  VisitHeadSize(p, [&](auto size) { Launch<size>(context, p, rows); });
}

}  // namespace longspan::cuda
