#pragma once
// Few rows times weights at the speed at which memory gives the weights, also while what comes
// before is not done. One block a multiprocessor; the weights of its columns come through a ring in
// shared memory, which begins to fill while x is still being made: rings of all blocks hold up to
// 28 MB, what an H100's memory gives in 9 us.
//
// Where x is long and columns are few, blocks share these in clusters (kSplit): each multiplies its
// part of the elements, of which alone it needs x, and at the end one of them adds.
//
// A form says, besides what a ring asks of it (weight_ring.cuh):
//   kSlice, kWide  elements and columns that a warp takes of a stage
//   kGrain         elements of a column are a multiple of
//   X     x in shared memory, a chunk of its elements at a time: X(memory, rows, chunk), of
//         Bytes(rows, chunk); Load<threads>(x, stride, elements), by so many threads
//   Sums  of a warp's columns: Add(stage, lines, slice, x, at, left) adds a slice of a stage that
//         begins at the first of so many lines, up to `left` elements of it, times x from element
//         `at` of its chunk on; Visit(rows, put) calls put(row, column, sum) for what the lane has
//         of so many rows, and maybe of the next if they are odd
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/clusters.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/phases.cuh"
#include "kernels/cuda/weight_ring.cuh"

namespace longspan::cuda {

// A stage has work for some warps, its team: one for each slice of each kWide columns. Teams take
// stages in turn, as a warp has much to do between two that it waits for.
constexpr int kStreamWarps = 16;
constexpr int kStreamThreads = kStreamWarps * kWarp;
constexpr int kAllThreads = kStreamThreads + kCopiers * kWarp;
template <class Form>
constexpr int kSlices = kStep / Form::kSlice;
template <class Form>
constexpr int kMostTeam = kSlices<Form>* Form::kItemColumns / Form::kWide;

constexpr int kMostXBytes = 82 << 10;
constexpr int kStaticBytes = 1 << 10;  // barriers, and what the device takes of a block
// Each warp's sums of an item, of rows in pairs; and those of the item before it.
template <class Form>
__host__ __device__ constexpr int SumBytes(int rows) {
  return 2 * kStreamWarps * ((rows + 1) / 2 * 2) * Form::kWide * int{sizeof(float)};
}
template <class Form>
constexpr int kLeastRingBytes = 3 * Form::kItemColumns / Form::kColumns* Form::Bytes(kStep);
template <class Form>
constexpr int kLeastSharedBytes = kLeastRingBytes<Form> + SumBytes<Form>(kStreamRows) + kMostXBytes
                                  + kStaticBytes;  // Blackwell's for desktops have less

// Blocks of a cluster that share columns, how many items they may, and the sums of all items.
constexpr int kSplitBlocks = 4, kMostKept = 8;
template <class Form, int kSplit>
__host__ __device__ constexpr int KeptBytes(int rows) {
  return kSplit == 1 ? 0 : kMostKept * rows * Form::kItemColumns * int{sizeof(float)};
}

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

// kept: where kSplit, the sums of all items.
template <class Form, bool kGated, int kSplit>
__device__ __forceinline__ void MultiplyItems(const StreamArgs& a, const Ring& ring,
                                              float* all_sums, unsigned char* x_memory,
                                              float* kept) {
  const int in = a.weights.in, rows = a.rows;
  const unsigned warp = threadIdx.x / kWarp;
  const typename Form::X x(x_memory, rows, a.chunk);
  Stage stage;
  int loaded = -1;  // the chunk of x in shared memory
  int parity = 0;   // of all_sums
  for (Item<Form, kGated, kSplit> item; item.Next(a.weights);) {
    const int stage_bytes = item.StageLines() * Form::Bytes(kStep);
    const unsigned wide = Form::kItemColumns == Form::kWide  // as many columns as one warp takes
                              ? 1
                              : item.StageLines() * Form::kColumns / Form::kWide;
    const unsigned team_warps = kSlices<Form> * wide, teams = kStreamWarps / team_warps;
    const unsigned team = warp / team_warps, in_team = warp % team_warps;
    const int part = in_team / wide, slice = part * Form::kSlice;
    const int first_line = in_team % wide * Form::kWide / Form::kColumns;
    // Teams go on in turn from item to item, so that none has two stages that follow each other.
    // There are 2, 4 or 8; where columns are thrice kWide some warps have none.
    const unsigned first_team = stage.number & (teams - 1);
    typename Form::Sums sum;
    int chunk = 0;
    for (int k = 0; k < in; k += kStep) {
      if (k == (chunk + 1) * a.chunk) ++chunk;
      if (chunk != loaded) {
        if (loaded >= 0) SyncStream();
        const int begin = chunk * a.chunk;
        x.template Load<kStreamThreads>(a.x + begin, a.x_stride, min(a.chunk, in - begin));
        SyncStream();
        loaded = chunk;
      }
      stage.Place(ring, stage_bytes);
      if ((stage.number & (teams - 1)) == team) {
        AwaitPhase(BarrierOf(ring.filled, stage.number), ParityOf(stage.number));
        if (k + slice < in) {
          sum.Add(ring.memory + stage.at + first_line * Form::Bytes(kStep),
                  item.StageLines() - first_line, slice, x, k - chunk * a.chunk + slice,
                  in - k - slice);
        }
        __syncwarp();
        if (threadIdx.x % kWarp == 0) {
          Arrive(BarrierOf(ring.used, stage.number),
                 in_team > 0 ? 1 : static_cast<int>(kMostTeam<Form> - team_warps) + 1);
        }
      }
      stage.Next(stage_bytes);
    }
    // Of a row and column there are as many parts as warps had it, in the stages' order: how many
    // depends on the item's columns, not on rows.
    const int columns = wide * Form::kWide, parts = teams * kSlices<Form>;
    const int each_part = (rows + 1) / 2 * 2 * columns;
    const auto Place = [&](int row, int column) {  // warps write without bank conflicts
      return row * columns + (column ^ row / 2 * 8);
    };
    float* sums = all_sums + parity * (SumBytes<Form>(rows) / 2 / sizeof(float));
    parity ^= 1;
    if (team < teams) {
      const unsigned turn = (team - first_team) & (teams - 1);
      float* to = sums + (turn * kSlices<Form> + part) * each_part;
      sum.Visit(rows, [&](int row, int column, float value) {
        to[Place(row, first_line * Form::kColumns + column)] = value;
      });
    }
    SyncStream();
    const int row = threadIdx.x / Form::kItemColumns, column = threadIdx.x % Form::kItemColumns;
    const int first = item.first * Form::kColumns;
    if (row < rows && column < item.lines * Form::kColumns && first + column < a.columns) {
      const auto All = [&](int of_stage) {
        float all = 0;
#pragma unroll
        for (int p = 0; p < parts; ++p) all += sums[p * each_part + Place(row, of_stage)];
        return all;
      };
      if constexpr (kSplit > 1) {
        kept[row * Form::kItemColumns + column] = All(column);
      } else {
        a.out[row * a.out_stride + first + column] =
            kGated ? Activated(a.gelu, All(column), All(column + item.each * Form::kColumns))
                   : All(column);
      }
    }
    kept += kSplit > 1 ? rows * Form::kItemColumns : 0;
  }
}

// Adds what the blocks of a cluster kept, in their order; each adds some of the items.
template <class Form, int kSplit>
__device__ __forceinline__ void AddKept(const StreamArgs& a, const float* kept) {
  SyncCluster();
  const int row = threadIdx.x / Form::kItemColumns, column = threadIdx.x % Form::kItemColumns;
  int owner = 0;
  for (Item<Form, false, kSplit> item; item.Next(a.weights);) {
    const int first = item.first * Form::kColumns;
    if (owner == RankInCluster() && row < a.rows && column < item.lines * Form::kColumns &&
        first + column < a.columns) {
      float parts[kSplit], all = 0;
#pragma unroll
      for (int b = 0; b < kSplit; ++b) {
        parts[b] = LoadOfBlock(&kept[row * Form::kItemColumns + column], b);
      }
#pragma unroll
      for (const float part : parts) all += part;
      a.out[row * a.out_stride + first + column] = all;
    }
    owner = (owner + 1) % kSplit;
    kept += a.rows * Form::kItemColumns;
  }
  SyncCluster();  // the others have read
}

// grid: a block a multiprocessor, or fewer where there are few columns.
template <class Form, bool kGated, int kSplit>
__global__ void __launch_bounds__(kAllThreads, 1) Stream(const __grid_constant__ StreamArgs args) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Barriers barriers;
  LetNextBegin();
  StreamArgs a = args;
  if constexpr (kSplit > 1) {
    const int steps = (a.weights.in + kStep - 1) / kStep, rank = RankInCluster();
    const int begin = steps * rank / kSplit * kStep, end = steps * (rank + 1) / kSplit * kStep;
    a.x += begin;
    a.weights.weights += Form::Bytes(begin);
    a.weights.in = min(end, a.weights.in) - begin;
  }
  const Ring ring(memory, a.ring_bytes, barriers, kMostTeam<Form>);
  if (threadIdx.x >= kStreamThreads) {
    return CopyWeights<Form, kGated, kSplit>(a.weights, ring, threadIdx.x / kWarp - kStreamWarps);
  }
  AwaitEarlier();
  auto* sums = reinterpret_cast<float*>(memory + a.ring_bytes);
  float* kept = sums + SumBytes<Form>(a.rows) / sizeof(float);
  auto* x = reinterpret_cast<unsigned char*>(kept) + KeptBytes<Form, kSplit>(a.rows);
  MultiplyItems<Form, kGated, kSplit>(a, ring, sums, x, kept);
  if constexpr (kSplit > 1) AddKept<Form, kSplit>(a, kept);
}

// Whether the device and the rows let it; what the form asks of the weights and x is its own.
template <class Form>
bool HasRoomToStream(const BackendContext& context, const Product& p) {
  return context.compute_capability >= 90 && context.max_shared_bytes >= kLeastSharedBytes<Form> &&
         p.in() % Form::kGrain == 0 && p.rows() <= kStreamRows;
}

// From so many elements on x is long: that each block reads all of it takes longer than clusters do
// to begin and to meet. Gemma 3 4B in Q4_K on an H100, one sequence, us an op: down, 10,240
// elements, 20.0 -> 14.6; o, 2,048, 8.1 -> 9.6.
constexpr int kLongX = 2 * kSplitBlocks * kStep;

// Clusters that multiply so many lines, 0 where they are not worth it.
template <class Form>
int ClustersOf(BackendContext& context, const StreamArgs& a) {
  if (a.weights.up != nullptr || a.weights.in < kLongX) return 0;
  if (context.whole_clusters == 0) {
    const auto kernel = Stream<Form, false, kSplitBlocks>;
    const int bytes = context.max_shared_bytes - kStaticBytes;
    Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
       "MatMul");
    const LaunchConfig config(context, {.shared_bytes = bytes, .cluster = kSplitBlocks},
                              dim3(kSplitBlocks), kAllThreads);
    Ok(context, cudaOccupancyMaxActiveClusters(&context.whole_clusters, kernel, config.get()),
       "MatMul");
  }
  const int clusters = std::min(context.whole_clusters, a.weights.count);
  int items = 0;
  for (int begin = 0; begin < a.weights.count && clusters > 0; ++items) {
    begin += Item<Form, false>::Each(a.weights.count - begin, clusters) * clusters;
  }
  return items <= kMostKept ? clusters : 0;
}

template <class Form, bool kGated, int kSplit>
void LaunchStreamIn(BackendContext& context, StreamArgs a, int blocks) {
  // Whole steps, as few chunks as there is room for.
  const int in = kSplit == 1 ? a.weights.in : Blocks(a.weights.in, kSplit * kStep) * kStep;
  int chunks = 1;
  do {
    a.chunk = chunks == 1 ? in : Blocks(in, chunks * kStep) * kStep;
    ++chunks;
  } while (Form::X::Bytes(a.rows, a.chunk) > kMostXBytes);
  const int others =
      SumBytes<Form>(a.rows) + KeptBytes<Form, kSplit>(a.rows) + Form::X::Bytes(a.rows, a.chunk);
  a.ring_bytes = (context.max_shared_bytes - kStaticBytes - others) / 128 * 128;
  CHECK_GE(a.ring_bytes, kLeastRingBytes<Form>) << others << " bytes besides weights";
  const int bytes = a.ring_bytes + others;
  const auto kernel = Stream<Form, kGated, kSplit>;
  Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
     "MatMul");
  LaunchEarlyWith(context, {.shared_bytes = bytes, .cluster = kSplit}, kernel, dim3(blocks),
                  kAllThreads, a);
}

template <class Form>
void LaunchStream(BackendContext& context, const Product& p) {
  StreamArgs a;
  DescribeRows(p, &a);
  const auto in = static_cast<int>(p.in());
  a.weights = {p.weight.as<unsigned char>(), p.up.as<unsigned char>(),
               BytesOf(p.weight.dtype, p.weight.stride[0] * Form::kColumns), in,
               Blocks(a.columns, Form::kColumns)};
  const int blocks = std::min(context.sm_count, Blocks(a.weights.count, Form::kLeastLines));
  if (a.weights.up != nullptr) {
    LaunchStreamIn<Form, true, 1>(context, a, blocks);
  } else if (const int clusters = ClustersOf<Form>(context, a); clusters > 0) {
    LaunchStreamIn<Form, false, kSplitBlocks>(context, a, clusters * kSplitBlocks);
  } else {
    LaunchStreamIn<Form, false, 1>(context, a, blocks);
  }
}

}  // namespace longspan::cuda
