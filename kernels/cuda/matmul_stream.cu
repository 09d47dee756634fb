// Few rows times bf16 weights at the speed at which memory gives the weights, also while what comes
// before is not done. One block a multiprocessor; the weights of its columns come through a ring in
// shared memory, which begins to fill while x is still being made: rings of all blocks hold up to
// 27 MB, what an H100's memory gives in 9 us.
//
// Weights are the products' rows and x's rows their columns, of which a product has 8. x goes in as
// two bf16 (its rounding and what that lost), which keeps 16 bits of it.
#include <algorithm>
#include <cstdint>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/phases.cuh"
#include "kernels/cuda/tensor_cores.cuh"
#include "kernels/cuda/weight_ring.cuh"

namespace longspan::cuda {
namespace {

// Two teams take stages in turn: a warp has much to do between two that it waits for.
constexpr int kTeams = 2;
constexpr int kWarps = kTeams * kSlices;
constexpr int kThreads = kWarps * kWarp;  // besides those of the warps that copy
constexpr int kTile = 16;                 // columns of a product

// x stands in shared memory, a chunk of its elements at a time, as rows of high halves, then rows
// of low ones, apart so that a warp reads without bank conflicts.
constexpr int kMostXBytes = 82 << 10;
constexpr int kStaticBytes = 1 << 10;  // barriers, and what the device takes of a block
__host__ __device__ constexpr int PitchOf(int chunk) { return chunk * int{sizeof(Bf16)} + 64; }
// The warps' sums of an item, in pairs of rows; and of the item before it.
__host__ __device__ constexpr int SumsOf(int rows) { return (rows + 1) / 2 * 2 * kItemColumns; }
constexpr int SumBytes(int rows) { return 2 * kWarps * SumsOf(rows) * int{sizeof(float)}; }
constexpr int kLeastSharedBytes = kLeastRingBytes + SumBytes(kStreamRows) + kMostXBytes +
                                  kStaticBytes;  // Blackwell's for desktops have less

struct StreamArgs {
  const float* x;
  int64_t x_stride;
  Columns columns;
  float* out;
  int64_t out_stride;
  int rows;
  int chunk;  // elements of x in shared memory
  int ring_bytes;
  bool gelu;
};

// Those that multiply wait for each other.
__device__ __forceinline__ void Sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

__device__ __forceinline__ void LoadX(const StreamArgs& a, int first, unsigned char* to) {
  const int octets = min(a.chunk, a.columns.in - first) / 8, pitch = PitchOf(a.chunk);
#pragma unroll 5
  for (int i = threadIdx.x; i < a.rows * octets; i += kThreads) {
    const int row = i / octets, octet = i - row * octets;
    const auto* from = reinterpret_cast<const float4*>(a.x + row * a.x_stride + first + octet * 8);
    const float4 v = from[0], w = from[1];
    uint4 high, low;
    SplitBf16(v.x, v.y, &high.x, &low.x);
    SplitBf16(v.z, v.w, &high.y, &low.y);
    SplitBf16(w.x, w.y, &high.z, &low.z);
    SplitBf16(w.z, w.w, &high.w, &low.w);
    unsigned char* at = to + row * pitch + octet * 16;
    *reinterpret_cast<uint4*>(at) = high;
    *reinterpret_cast<uint4*>(at + a.rows * pitch) = low;
  }
}

// Where in a warp's sums a row and column are: a warp writes without bank conflicts.
__device__ __forceinline__ int PlaceOfSum(int row, int column) {
  return row * kItemColumns + (column + row / 2 * 8) % kItemColumns;
}

template <bool kGated>
__device__ __forceinline__ void MultiplyItems(const StreamArgs& a, const Ring& ring,
                                              float* all_sums, unsigned char* x_memory) {
  const int in = a.columns.in;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4;
  const int team = warp / kSlices, slice = warp % kSlices * kSlice;
  const int rows = a.rows, pitch = PitchOf(a.chunk), low_x = rows * pitch;
  // Columns of a product beyond x's rows repeat the last one.
  const unsigned char* x =
      x_memory + min(group, rows - 1) * pitch + slice * int{sizeof(Bf16)} + lane % 4 * 16;
  Stage stage;
  int loaded = -1;  // the chunk of x in shared memory
  int parity = 0;   // of all_sums
  for (Item<kGated> item; item.Next(a.columns);) {
    const int stage_columns = item.StageColumns();
    const int first_team = static_cast<int>(stage.number % kTeams);
    float high[2][4] = {}, low[2][4] = {};
    int chunk = 0;
    for (int k0 = 0; k0 < in; k0 += kStep) {
      if (k0 == (chunk + 1) * a.chunk) ++chunk;
      if (chunk != loaded) {
        if (loaded >= 0) Sync();
        LoadX(a, chunk * a.chunk, x_memory);
        Sync();
        loaded = chunk;
      }
      stage.Place(ring, stage_columns * kStageRow);
      if (static_cast<int>(stage.number % kTeams) == team) {
        AwaitPhase(BarrierOf(ring.filled, stage.number), ParityOf(stage.number));
        if (k0 + slice < in) {
          uint4 h[2], l[2];  // halves of the slice
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const auto* at = x + (k0 - chunk * a.chunk + i * 32) * sizeof(Bf16);
            h[i] = *reinterpret_cast<const uint4*>(at);
            l[i] = *reinterpret_cast<const uint4*>(at + low_x);
          }
          const SliceReader reader = {ring.memory + stage.at, slice, stage_columns};
#pragma unroll
          for (int t = 0; t < 2; ++t) {
            uint4 v[2], u[2];
            reader.Read(t * kTile, v);
            reader.Read(t * kTile + 8, u);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              Multiply<Bf16>(high[t], {v[i].x, u[i].x, v[i].y, u[i].y}, h[i].x, h[i].y);
              Multiply<Bf16>(low[t], {v[i].x, u[i].x, v[i].y, u[i].y}, l[i].x, l[i].y);
              Multiply<Bf16>(high[t], {v[i].z, u[i].z, v[i].w, u[i].w}, h[i].z, h[i].w);
              Multiply<Bf16>(low[t], {v[i].z, u[i].z, v[i].w, u[i].w}, l[i].z, l[i].w);
            }
          }
        }
        __syncwarp();
        if (lane == 0) Arrive(BarrierOf(ring.used, stage.number));
      }
      stage.Next(stage_columns * kStageRow);
    }
    // The warps' sums, those of the team that had the first step first: so that a column's sum does
    // not depend on its item.
    const int each_sums = SumsOf(rows);
    float* sums = all_sums + parity * kWarps * each_sums;
    parity ^= 1;
    if (lane % 4 * 2 < rows) {
      float* to = sums + ((team ^ first_team) * kSlices + warp % kSlices) * each_sums;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        to[PlaceOfSum(lane % 4 * 2 + i % 2, i / 2 * 8 + group)] =
            high[i / 4][i % 4] + low[i / 4][i % 4];
      }
    }
    Sync();
    const int row = threadIdx.x / kItemColumns, column = threadIdx.x % kItemColumns;
    if (row < rows && column < item.columns) {
      const auto All = [&](int of_stage) {
        float all = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) all += sums[w * each_sums + PlaceOfSum(row, of_stage)];
        return all;
      };
      a.out[row * a.out_stride + item.first + column] =
          kGated ? Activated(a.gelu, All(column), All(column + item.each)) : All(column);
    }
  }
}

// grid: a block a multiprocessor, or fewer where there are few columns.
template <bool kGated>
__global__ void __launch_bounds__(kThreads + kCopiers * kWarp, 1)
    Stream(const __grid_constant__ StreamArgs a) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Barriers barriers;
  LetNextBegin();
  const Ring ring(memory, a.ring_bytes, barriers, kSlices);
  if (threadIdx.x >= kThreads) {
    return CopyWeights<kGated>(a.columns, ring, threadIdx.x / kWarp - kWarps);
  }
  AwaitEarlier();
  auto* sums = reinterpret_cast<float*>(memory + a.ring_bytes);
  MultiplyItems<kGated>(a, ring, sums,
                        reinterpret_cast<unsigned char*>(sums + 2 * kWarps * SumsOf(a.rows)));
}

}  // namespace

bool Streams(const BackendContext& context, const Product& p) {
  return context.compute_capability >= 90 && context.max_shared_bytes >= kLeastSharedBytes &&
         Bf16InVectors(p) && p.in() % kSlice == 0 && p.rows() <= kStreamRows;
}

void MultiplyStream(BackendContext& context, const Product& p) {
  const auto in = static_cast<int>(p.in());
  StreamArgs a = {p.x.as<float>(), p.x.stride[0], Columns(p), p.out.as<float>(), p.out.stride[0]};
  a.rows = static_cast<int>(p.rows());
  a.gelu = p.activation == Activation::kGeluTanh;
  // Whole steps, as few chunks as there is room for.
  int chunks = 1;
  do {
    a.chunk = chunks == 1 ? in : Blocks(in, chunks * kStep) * kStep;
    ++chunks;
  } while (2 * a.rows * PitchOf(a.chunk) > kMostXBytes);
  const int others = SumBytes(a.rows) + 2 * a.rows * PitchOf(a.chunk);
  a.ring_bytes = (context.max_shared_bytes - kStaticBytes - others) / 128 * 128;
  CHECK_GE(a.ring_bytes, kLeastRingBytes) << others << " bytes besides weights";
  const int bytes = a.ring_bytes + others;
  const auto kernel = a.columns.up != nullptr ? Stream<true> : Stream<false>;
  Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
     "MatMul");
  const int blocks = std::min(context.sm_count, Blocks(a.columns.count, kLeastColumns));
  LaunchEarlyWith(context, {.shared_bytes = bytes}, kernel, dim3(blocks),
                  kThreads + kCopiers * kWarp, a);
}

}  // namespace longspan::cuda
