#pragma once
// Few rows times weights at the speed at which memory gives the weights, also while what comes
// before is not done. One block a multiprocessor; the weights of its columns come through a ring in
// shared memory, which begins to fill while x is still being made: rings of all blocks hold up to
// 27 MB, what an H100's memory gives in 9 us.
//
// Weights are the products' rows and x's rows their columns, of which a product has 8. A form says,
// besides what a ring asks of it (weight_ring.cuh):
//   MostBlocks(lines)  blocks of threads that so many lines of out are worth
//   X     x in shared memory, a chunk of its elements at a time: X(memory, rows, chunk), of
//         Bytes(rows, chunk); Load<threads>(x, stride, elements), by so many threads
//   Sums  of 32 columns, in a warp: Add(stage, lines, slice, x, at) adds a slice of a stage times x
//         from element `at` of its chunk on; At(i) is the sum of column i / 2 * 8 + lane / 4 and
//         row lane % 4 * 2 + i % 2
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/phases.cuh"
#include "kernels/cuda/weight_ring.cuh"

namespace longspan::cuda {

// Two teams take stages in turn: a warp has much to do between two that it waits for. (Of block
// weights three are slower: a step of Gemma 3 4B in Q4_K 2.63 ms instead of 2.44 on an H100.)
constexpr int kTeams = 2;
constexpr int kStreamWarps = kTeams * kSlices;
constexpr int kStreamThreads = kStreamWarps * kWarp;  // besides those of the warps that copy

constexpr int kMostXBytes = 82 << 10;
constexpr int kStaticBytes = 1 << 10;  // barriers, and what the device takes of a block
// The warps' sums of an item, in pairs of rows; and of the item before it.
__host__ __device__ constexpr int SumsOf(int rows) { return (rows + 1) / 2 * 2 * kItemColumns; }
constexpr int SumBytes(int rows) { return 2 * kStreamWarps * SumsOf(rows) * int{sizeof(float)}; }
template <class Form>
constexpr int kLeastRingBytes = 3 * kItemColumns / Form::kColumns* Form::Bytes(kStep);
template <class Form>
constexpr int kLeastSharedBytes = kLeastRingBytes<Form> + SumBytes(kStreamRows) + kMostXBytes
                                  + kStaticBytes;  // Blackwell's for desktops have less

struct StreamArgs {
  const float* x;
  int64_t x_stride;
  Lines weights;
  float* out;
  int64_t out_stride;
  int rows, columns;  // of out
  int chunk;          // elements of x in shared memory
  int ring_bytes;
  bool gelu;
};

// Those that multiply wait for each other.
__device__ __forceinline__ void SyncStream() {
  asm volatile("bar.sync 1, %0;" ::"n"(kStreamThreads) : "memory");
}

// Where in a warp's sums a row and column are: a warp writes without bank conflicts.
__device__ __forceinline__ int PlaceOfSum(int row, int column) {
  return row * kItemColumns + (column + row / 2 * 8) % kItemColumns;
}

template <class Form, bool kGated>
__device__ __forceinline__ void MultiplyItems(const StreamArgs& a, const Ring& ring,
                                              float* all_sums, unsigned char* x_memory) {
  const int in = a.weights.in, rows = a.rows;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int team = warp / kSlices, slice = warp % kSlices * kSlice;
  const typename Form::X x(x_memory, rows, a.chunk);
  Stage stage;
  int loaded = -1;  // the chunk of x in shared memory
  int parity = 0;   // of all_sums
  for (Item<Form, kGated> item; item.Next(a.weights);) {
    const int stage_lines = item.StageLines();
    const int first_team = static_cast<int>(stage.number % kTeams);
    typename Form::Sums sum;
    int chunk = 0;
    for (int k0 = 0; k0 < in; k0 += kStep) {
      if (k0 == (chunk + 1) * a.chunk) ++chunk;
      if (chunk != loaded) {
        if (loaded >= 0) SyncStream();
        const int begin = chunk * a.chunk;
        x.template Load<kStreamThreads>(a.x + begin, a.x_stride, min(a.chunk, in - begin));
        SyncStream();
        loaded = chunk;
      }
      stage.Place(ring, stage_lines * Form::Bytes(kStep));
      if (static_cast<int>(stage.number % kTeams) == team) {
        AwaitPhase(BarrierOf(ring.filled, stage.number), ParityOf(stage.number));
        if (k0 + slice < in) {
          sum.Add(ring.memory + stage.at, stage_lines, slice, x, k0 - chunk * a.chunk + slice);
        }
        __syncwarp();
        if (lane == 0) Arrive(BarrierOf(ring.used, stage.number));
      }
      stage.Next(stage_lines * Form::Bytes(kStep));
    }
    // The warps' sums, those of the team that had the first step first: so that a column's sum does
    // not depend on its item.
    const int each_sums = SumsOf(rows);
    float* sums = all_sums + parity * kStreamWarps * each_sums;
    parity ^= 1;
    if (lane % 4 * 2 < rows) {
      float* to = sums + ((team ^ first_team) * kSlices + warp % kSlices) * each_sums;
#pragma unroll
      for (int i = 0; i < kItemColumns / 4; ++i) {
        to[PlaceOfSum(lane % 4 * 2 + i % 2, i / 2 * 8 + lane / 4)] = sum.At(i);
      }
    }
    SyncStream();
    const int row = threadIdx.x / kItemColumns, column = threadIdx.x % kItemColumns;
    const int first = item.first * Form::kColumns;
    if (row < rows && column < item.lines * Form::kColumns && first + column < a.columns) {
      const auto All = [&](int of_stage) {
        float all = 0;
#pragma unroll
        for (int w = 0; w < kStreamWarps; ++w) {
          all += sums[w * each_sums + PlaceOfSum(row, of_stage)];
        }
        return all;
      };
      a.out[row * a.out_stride + first + column] =
          kGated ? Activated(a.gelu, All(column), All(column + item.each * Form::kColumns))
                 : All(column);
    }
  }
}

// grid: a block a multiprocessor, or fewer where there are few columns.
template <class Form, bool kGated>
__global__ void __launch_bounds__(kStreamThreads + kCopiers * kWarp, 1)
    Stream(const __grid_constant__ StreamArgs a) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Barriers barriers;
  LetNextBegin();
  const Ring ring(memory, a.ring_bytes, barriers, kSlices);
  if (threadIdx.x >= kStreamThreads) {
    return CopyWeights<Form, kGated>(a.weights, ring, threadIdx.x / kWarp - kStreamWarps);
  }
  AwaitEarlier();
  auto* sums = reinterpret_cast<float*>(memory + a.ring_bytes);
  MultiplyItems<Form, kGated>(
      a, ring, sums, reinterpret_cast<unsigned char*>(sums + 2 * kStreamWarps * SumsOf(a.rows)));
}

// Whether the device and the rows let it; what the form asks of the weights and x is its own.
template <class Form>
bool HasRoomToStream(const BackendContext& context, const Product& p) {
  return context.compute_capability >= 90 && context.max_shared_bytes >= kLeastSharedBytes<Form> &&
         p.in() % kSlice == 0 && p.rows() <= kStreamRows;
}

template <class Form>
void LaunchStream(BackendContext& context, const Product& p) {
  StreamArgs a;
  a.x = p.x.as<float>();
  a.x_stride = p.x.stride[0];
  a.out = p.out.as<float>();
  a.out_stride = p.out.stride[0];
  a.rows = static_cast<int>(p.rows());
  a.columns = static_cast<int>(p.columns());
  a.gelu = p.activation == Activation::kGeluTanh;
  const auto in = static_cast<int>(p.in());
  a.weights = {p.weight.as<unsigned char>(), p.up.as<unsigned char>(),
               BytesOf(p.weight.dtype, p.weight.stride[0] * Form::kColumns), in,
               Blocks(a.columns, Form::kColumns)};
  // Whole steps, as few chunks as there is room for.
  int chunks = 1;
  do {
    a.chunk = chunks == 1 ? in : Blocks(in, chunks * kStep) * kStep;
    ++chunks;
  } while (Form::X::Bytes(a.rows, a.chunk) > kMostXBytes);
  const int others = SumBytes(a.rows) + Form::X::Bytes(a.rows, a.chunk);
  a.ring_bytes = (context.max_shared_bytes - kStaticBytes - others) / 128 * 128;
  CHECK_GE(a.ring_bytes, kLeastRingBytes<Form>) << others << " bytes besides weights";
  const int bytes = a.ring_bytes + others;
  const auto kernel = a.weights.up != nullptr ? Stream<Form, true> : Stream<Form, false>;
  Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
     "MatMul");
  const int blocks = std::min(context.sm_count, Form::MostBlocks(a.weights.count));
  LaunchEarlyWith(context, {.shared_bytes = bytes}, kernel, dim3(blocks),
                  kStreamThreads + kCopiers * kWarp, a);
}

}  // namespace longspan::cuda
