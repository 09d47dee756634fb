#pragma once
// The way of bf16 weights from memory into a block: some warps copy the columns of its items, step
// after step, through a ring of stages in shared memory, from which others multiply. For sm_90 and
// later.
#include <cstdint>

#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/phases.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {

// Copies of 1 KB begin one after another in a warp, some 40 ns each on an H100: one warp moves no
// more than 3.3 TB/s, even out of the L2 cache.
constexpr int kCopiers = 4;
constexpr int kItemColumns = 32;
constexpr int kLeastColumns = 8;         // of a block
constexpr int kSlice = 64;               // elements of a column that a warp takes of a stage
constexpr int kSlices = 8;               // of a stage
constexpr int kStep = kSlices * kSlice;  // of a column in a stage
constexpr int kStageRow = kStep * int{sizeof(Bf16)};
constexpr int kMostStages = 16;  // under way
constexpr int kLeastRingBytes = 3 * kItemColumns * kStageRow;
static_assert(kItemColumns <= kCopiers * kWarp && kMostStages <= kWarp);

// Where gated, a column of out is one of weights and one of up.
struct Columns {
  const Bf16 *weights, *up;
  int64_t stride;
  int in, count;

  explicit Columns(const Product& p)
      : weights(p.weight.as<Bf16>()),
        up(p.up.as<Bf16>()),
        stride(p.weight.stride[0]),
        in(static_cast<int>(p.in())),
        count(static_cast<int>(p.columns())) {}
};

// What a block makes at a time: items of all blocks follow each other in columns, and those of the
// last round are as small as gives each block one.
template <bool kGated>
struct Item {
  static constexpr int kMost = kGated ? kItemColumns / 2 : kItemColumns;
  int first = 0, each = 0;  // columns of out: those of the round's items but its last
  int columns = 0;          // of this
  int begin = 0;            // of the round

  __device__ __forceinline__ bool Next(const Columns& a) {
    const int blocks = gridDim.x;
    begin += each * blocks;
    const int left = a.count - begin;
    each = left >= kMost * blocks ? kMost : max(kLeastColumns, (left + blocks - 1) / blocks);
    first = begin + static_cast<int>(blockIdx.x) * each;
    columns = min(each, a.count - first);
    return columns > 0;
  }
  // Columns of weights in a stage: gate's, then up's.
  __device__ __forceinline__ int StageColumns() const { return kGated ? 2 * each : each; }
};

// Stages of any size follow each other in the ring; barriers they take in turn. `filled` passes
// when a stage's bytes are there, `used` when all warps are done with them.
struct Barriers {
  uint64_t filled[kMostStages], used[kMostStages];
};
struct Ring {
  uint32_t memory, filled, used;
  uint32_t bytes;

  // By all threads of the block. `users`: warps that are done with a stage before it is used.
  __device__ __forceinline__ Ring(const void* at, int size, Barriers& barriers, int users)
      : memory(Shared(at)),
        filled(Shared(barriers.filled)),
        used(Shared(barriers.used)),
        bytes(size) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kMostStages; ++s) {
        InitBarrier(filled + s * 8, kCopiers);
        InitBarrier(used + s * 8, users);
      }
    }
    __syncthreads();
  }
};
__device__ __forceinline__ uint32_t BarrierOf(uint32_t barriers, uint32_t stage) {
  return barriers + stage % kMostStages * 8;
}
__device__ __forceinline__ int ParityOf(uint32_t stage) { return stage / kMostStages % 2; }

struct Stage {
  uint32_t number = 0;
  uint32_t at = 0;     // in the ring
  uint32_t begin = 0;  // the same if the ring had no end

  // Where it does not fit before the ring's end it begins anew.
  __device__ __forceinline__ void Place(const Ring& ring, uint32_t bytes) {
    if (at + bytes <= ring.bytes) return;
    begin += ring.bytes - at;
    at = 0;
  }
  __device__ __forceinline__ void Next(uint32_t bytes) {
    ++number;
    at += bytes;
    begin += bytes;
  }
};

// Of each stage a copier has every so many columns.
template <bool kGated>
__device__ __forceinline__ void CopyWeights(const Columns& a, const Ring& ring, int copier) {
  const int lane = threadIdx.x % kWarp;
  const int column = lane * kCopiers + copier;
  const uint64_t once = ReadOnce();
  Stage stage;
  uint32_t oldest = 0;  // of the stages that are not known to be used
  uint32_t begin = 0;   // lane l: of the last stage that is l modulo kWarp
  for (Item<kGated> item; item.Next(a);) {
    const uint32_t stage_bytes = item.StageColumns() * kStageRow;
    const bool of_up = kGated && column >= item.each;
    const int in_item = of_up ? column - item.each : column;
    const bool copies = in_item < item.columns;
    const int copied = __popc(__ballot_sync(~0u, copies));
    const Bf16* from = (of_up ? a.up : a.weights) + (item.first + in_item) * a.stride;
    for (int k = 0; k < a.in; k += kStep) {
      stage.Place(ring, stage_bytes);
      const uint32_t end = stage.begin + stage_bytes;
      while (oldest != stage.number &&
             (stage.number - oldest == kMostStages ||
              end - __shfl_sync(~0u, begin, oldest % kWarp) > ring.bytes)) {
        AwaitPhase(BarrierOf(ring.used, oldest), ParityOf(oldest));
        ++oldest;
      }
      if (lane == stage.number % kWarp) begin = stage.begin;
      const uint32_t filled = BarrierOf(ring.filled, stage.number);
      const int bytes = min(kStep, a.in - k) * int{sizeof(Bf16)};
      if (lane == 0) ArriveExpecting(filled, copied * bytes);
      __syncwarp();
      if (copies) {
        CopyBulk(ring.memory + stage.at + column * kStageRow, from + k, bytes, filled, once);
      }
      stage.Next(stage_bytes);
    }
  }
}

// In a stage, this lane's 16 bytes of either half of a slice. Of odd columns it reads the second
// half first, so that no two lanes read from one bank.
struct SliceReader {
  const uint32_t stage;
  const int slice, columns;

  __device__ __forceinline__ void Read(int column, uint4 (&halves)[2]) const {
    const int lane = threadIdx.x % kWarp;
    const bool odd = lane / 4 % 2 == 1;
    const int at = min(column + lane / 4, columns - 1);  // beyond the stage's columns the last one
    const uint32_t from = stage + at * kStageRow + slice * int{sizeof(Bf16)} + lane % 4 * 16;
    const uint4 a = LoadShared(from + odd * 64), b = LoadShared(from + !odd * 64);
    halves[0] = Select(odd, a, b);
    halves[1] = Select(odd, b, a);
  }

 private:
  static __device__ __forceinline__ uint4 Select(bool second, const uint4& a, const uint4& b) {
    return {second ? b.x : a.x, second ? b.y : a.y, second ? b.z : a.z, second ? b.w : a.w};
  }
};

}  // namespace longspan::cuda
