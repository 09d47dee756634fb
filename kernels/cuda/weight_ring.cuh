#pragma once
// The way of weights from memory into a block: some warps copy what its items take of them, step
// after step, through a ring of stages in shared memory, from which others multiply. For sm_90 and
// later.
#include <cstdint>

#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/phases.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {

// Copies of 1 KB begin one after another in a warp, some 40 ns each on an H100: one warp moves no
// more than 3.3 TB/s, even out of the L2 cache.
constexpr int kCopiers = 4;
constexpr int kStep = 512;       // elements of a column in a stage
constexpr int kMostStages = 16;  // under way
static_assert(kMostStages <= kWarp);

// A product's weights lie in lines, a column of bf16 or a strip of blocks: of each, any whole step
// is one run of memory. A form of them says
//   kColumns         of a line
//   kItemColumns     of weights in a block's item, at most
//   kLeastLines      of an item, if there are as many
//   Bytes(elements)  of a line, with so many elements of each of its columns
// Where gated, a line of out is one of weights and one of up. kSplit blocks, a cluster, share
// items: each takes its part of the columns' elements.
struct Lines {
  const unsigned char *weights, *up;
  int64_t stride;  // bytes
  int in, count;   // elements of a column; lines of out
};

// What a block makes at a time: items of all blocks follow each other in lines, and those of the
// last round are smaller, so that each block has some.
template <class Form, bool kGated, int kSplit = 1>
struct Item {
  static constexpr int kMost = Form::kItemColumns / Form::kColumns / (kGated ? 2 : 1);
  int first = 0, each = 0;  // lines of out: those of the round's items but its last
  int lines = 0;            // of this
  int begin = 0;            // of the round

  // Lines of an item where so many are left for so many blocks or clusters.
  __host__ __device__ static int Each(int left, int blocks) {
    if (left >= kMost * blocks) return kMost;
    const int even = (left + blocks - 1) / blocks;
    return even < Form::kLeastLines ? Form::kLeastLines : even;
  }
  __device__ __forceinline__ bool Next(const Lines& a) {
    const int blocks = gridDim.x / kSplit;
    begin += each * blocks;
    each = Each(a.count - begin, blocks);
    first = begin + static_cast<int>(blockIdx.x / kSplit) * each;
    lines = min(each, a.count - first);
    return lines > 0;
  }
  // Lines of weights in a stage: gate's, then up's.
  __device__ __forceinline__ int StageLines() const { return kGated ? 2 * each : each; }
};

// Stages of any size follow each other in the ring; barriers they take in turn. `filled` passes
// when a stage's bytes are there, `used` when all warps are done with them.
struct Barriers {
  uint64_t filled[kMostStages], used[kMostStages];
};
struct Ring {
  uint32_t memory, filled, used;
  uint32_t bytes;

  // By all threads of the block. `arrivals`: after so many a stage is used.
  __device__ __forceinline__ Ring(const void* at, int size, Barriers& barriers, int arrivals)
      : memory(Shared(at)),
        filled(Shared(barriers.filled)),
        used(Shared(barriers.used)),
        bytes(size) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kMostStages; ++s) {
        InitBarrier(filled + s * 8, kCopiers);
        InitBarrier(used + s * 8, arrivals);
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

// Of each stage a copier has every so many lines.
template <class Form, bool kGated, int kSplit>
__device__ __forceinline__ void CopyWeights(const Lines& a, const Ring& ring, int copier) {
  const int lane = threadIdx.x % kWarp;
  const int line = lane * kCopiers + copier;
  const uint64_t once = ReadOnce();
  Stage stage;
  uint32_t oldest = 0;  // of the stages that are not known to be used
  uint32_t begin = 0;   // lane l: of the last stage that is l modulo kWarp
  for (Item<Form, kGated, kSplit> item; item.Next(a);) {
    const uint32_t stage_bytes = item.StageLines() * Form::Bytes(kStep);
    const bool of_up = kGated && line >= item.each;
    const int in_item = of_up ? line - item.each : line;
    const bool copies = in_item < item.lines;
    const int copied = __popc(__ballot_sync(~0u, copies));
    const unsigned char* from = (of_up ? a.up : a.weights) + (item.first + in_item) * a.stride;
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
      const int bytes = Form::Bytes(min(kStep, a.in - k));
      if (lane == 0) ArriveExpecting(filled, copied * bytes);
      __syncwarp();
      if (copies) {
        CopyBulk(ring.memory + stage.at + line * Form::Bytes(kStep), from + Form::Bytes(k), bytes,
                 filled, once);
      }
      stage.Next(stage_bytes);
    }
  }
}

}  // namespace longspan::cuda
