// Few rows times bf16 weights at the speed at which memory gives the weights, also while what comes
// before is not done. One block a multiprocessor, all with as many columns; one of its warps copies
// their weights through a ring in shared memory, and begins so while x is still being made: a ring
// of all blocks holds up to 26 MB, what an H100's memory gives in 9 us.
//
// Gated, half of a tile's columns are gate's and half up's, which give as many of out.
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

namespace longspan::cuda {
namespace {

using Bf16 = __nv_bfloat16;

constexpr int kTeams = 2;      // of a block, each at columns of its own
constexpr int kTeamWarps = 8;  // they take their slices in turn
constexpr int kWarps = kTeams * kTeamWarps;
constexpr int kThreads = kWarps * kWarp;  // besides those of the warp that copies
constexpr int kTile = 16;                 // columns of a product
constexpr int kItemColumns = kTeams * kTile;
constexpr int kLeastColumns = 8;            // of a block
constexpr int kSlice = 64;                  // elements of a column that a warp takes of a stage
constexpr int kStep = kTeamWarps * kSlice;  // of a column in a stage
constexpr int kStageRow = kStep * int{sizeof(Bf16)};
constexpr int kStageBytes = kItemColumns * kStageRow;
constexpr int kMostStages = 6;
constexpr int kSums = int{kStreamRows} * kTile;  // of a warp
constexpr int kAllSums = kWarps * kSums;
static_assert(kItemColumns == kWarp, "a lane copies a column");
static_assert(kSums <= kTeamWarps * kWarp, "a thread adds one");

// x stands in shared memory, a chunk of its elements at a time, as rows of high halves, then rows
// of low ones, apart so that a warp reads without bank conflicts.
constexpr int kMostXBytes = 82 << 10;
constexpr int kStaticBytes = 1 << 10;  // barriers, and what the device takes of a block
constexpr int kLeastStages = 3;
constexpr int kLeastSharedBytes = kLeastStages * kStageBytes + int{sizeof(float)} * 2 * kAllSums +
                                  kMostXBytes + kStaticBytes;  // Blackwell's for desktops have less
__host__ __device__ constexpr int PitchOf(int chunk) { return chunk * int{sizeof(Bf16)} + 64; }

struct StreamArgs {
  const float* x;
  int64_t x_stride;
  const Bf16 *weights, *up;  // up: where gated
  int64_t weight_stride;
  float* out;
  int64_t out_stride;
  int rows, in, columns;
  int each;   // columns of out that an item makes
  int chunk;  // elements of x in shared memory
  bool gelu;
};

// Whose turn it is with a ring of stages: `filled` passes when a stage's bytes are there, `used`
// when all warps are done with them.
struct Ring {
  uint32_t stages, filled, used;
  int count;
  int stage = 0, parity = 0;

  __device__ __forceinline__ void Next() {
    if (++stage == count) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ uint32_t Filled() const { return filled + stage * 8; }
  __device__ __forceinline__ uint32_t Used() const { return used + stage * 8; }
  __device__ __forceinline__ uint32_t Bytes() const { return stages + stage * kStageBytes; }
};

template <bool kGated>
__device__ __forceinline__ void CopyWeights(const StreamArgs& a, Ring ring) {
  const int lane = threadIdx.x % kWarp;
  const Bf16* matrix = kGated && lane % kTile >= kTile / 2 ? a.up : a.weights;
  const int in_item = kGated ? lane / kTile * (kTile / 2) + lane % (kTile / 2) : lane;
  bool used = false;  // the stages, for a first time
  for (int first = blockIdx.x * a.each; first < a.columns; first += gridDim.x * a.each) {
    const int columns = min(a.each, a.columns - first);
    const Bf16* from = matrix + (first + in_item) * a.weight_stride;
    for (int k = 0; k < a.in; k += kStep) {
      const int bytes = min(kStep, a.in - k) * int{sizeof(Bf16)};
      if (used) AwaitPhase(ring.Used(), ring.parity ^ 1);
      if (lane == 0) ArriveExpecting(ring.Filled(), (kGated ? 2 : 1) * columns * bytes);
      __syncwarp();
      if (in_item < columns) {
        CopyBulk(ring.Bytes() + lane * kStageRow, from + k, bytes, ring.Filled());
      }
      ring.Next();
      used = used || ring.stage == 0;
    }
  }
}

// Those that multiply wait for each other, all or a team.
__device__ __forceinline__ void Sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}
__device__ __forceinline__ void SyncTeam(int team) {
  asm volatile("bar.sync %0, %1;" ::"r"(2 + team), "n"(kTeamWarps * kWarp) : "memory");
}

__device__ __forceinline__ void LoadX(const StreamArgs& a, int first, unsigned char* to) {
  const int octets = min(a.chunk, a.in - first) / 8, pitch = PitchOf(a.chunk);
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

__device__ __forceinline__ uint4 Select(bool second, const uint4& a, const uint4& b) {
  return {second ? b.x : a.x, second ? b.y : a.y, second ? b.z : a.z, second ? b.w : a.w};
}

// Where in a warp's sums a row and column of its tile are: a warp writes without bank conflicts.
__device__ __forceinline__ int PlaceOfSum(int row, int column) {
  return row / 2 * 32 + (row % 2 * kTile + column + row / 2 * 8) % 32;
}

template <bool kGated>
__device__ __forceinline__ void MultiplyItems(const StreamArgs& a, Ring ring, float* all_sums,
                                              unsigned char* x_memory) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, group = lane / 4;
  const int team = warp / kTeamWarps, member = threadIdx.x % (kTeamWarps * kWarp);
  const int first_slice = warp % kTeamWarps * kSlice;
  const int pitch = PitchOf(a.chunk), low_x = a.rows * pitch;
  // Columns of a product beyond x's rows repeat the last one.
  const unsigned char* x = x_memory + min(group, a.rows - 1) * pitch + lane % 4 * 16;
  // Of its two columns, group and group + 8, a lane reads 16 bytes of either half of the slice; odd
  // ones the second half first, so that no two lanes read from one bank. Beyond the item's columns
  // it reads what lies there.
  const bool odd = group % 2 == 1;
  const uint32_t weights =
      (team * kTile + group) * kStageRow + first_slice * int{sizeof(Bf16)} + lane % 4 * 16;
  int loaded = -1, parity = 0;
  for (int first = blockIdx.x * a.each; first < a.columns; first += gridDim.x * a.each) {
    float high[4] = {}, low[4] = {};
    for (int k0 = 0; k0 < a.in; k0 += kStep) {
      const int chunk = k0 / a.chunk;
      if (chunk != loaded) {
        if (loaded >= 0) Sync();
        LoadX(a, chunk * a.chunk, x_memory);
        Sync();
        loaded = chunk;
      }
      AwaitPhase(ring.Filled(), ring.parity);
      if (k0 + first_slice < a.in) {
        uint4 w[2][2];  // [halves of the slice, columns]
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            w[i][c] = LoadShared(ring.Bytes() + weights + c * 8 * kStageRow + (i ^ odd) * 64);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto* at = x + (k0 - chunk * a.chunk + first_slice + i * 32) * sizeof(Bf16);
          const uint4 h = *reinterpret_cast<const uint4*>(at);
          const uint4 l = *reinterpret_cast<const uint4*>(at + low_x);
          const uint4 v = Select(odd, w[i][0], w[1 - i][0]), u = Select(odd, w[i][1], w[1 - i][1]);
          Multiply<Bf16>(high, {v.x, u.x, v.y, u.y}, h.x, h.y);
          Multiply<Bf16>(low, {v.x, u.x, v.y, u.y}, l.x, l.y);
          Multiply<Bf16>(high, {v.z, u.z, v.w, u.w}, h.z, h.w);
          Multiply<Bf16>(low, {v.z, u.z, v.w, u.w}, l.z, l.w);
        }
      }
      __syncwarp();
      if (lane == 0) Arrive(ring.Used());
      ring.Next();
    }
    // The warps' sums, in order.
    float* sums = all_sums + parity * kAllSums + team * kTeamWarps * kSums;
    parity ^= 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp % kTeamWarps * kSums + PlaceOfSum(lane % 4 * 2 + i % 2, i / 2 * 8 + group)] =
          high[i] + low[i];
    }
    SyncTeam(team);
    constexpr int kOuts = kGated ? kTile / 2 : kTile;  // of a team
    const int row = member / kOuts, column = member % kOuts, in_item = team * kOuts + column;
    if (row < a.rows && in_item < a.each && first + in_item < a.columns) {
      const auto All = [&](int of_tile) {
        float all = 0;
#pragma unroll
        for (int w = 0; w < kTeamWarps; ++w) all += sums[w * kSums + PlaceOfSum(row, of_tile)];
        return all;
      };
      a.out[row * a.out_stride + first + in_item] =
          kGated ? Activated(a.gelu, All(column), All(column + kTile / 2)) : All(column);
    }
  }
}

// grid: a block a multiprocessor, or fewer where there are few columns.
template <bool kGated>
__global__ void __launch_bounds__(kThreads + kWarp, 1)
    Stream(const __grid_constant__ StreamArgs a, int stages) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t filled[kMostStages], used[kMostStages];
  LetNextBegin();
  const Ring ring = {Shared(memory), Shared(filled), Shared(used), stages};
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      InitBarrier(Shared(&filled[s]), 1);
      InitBarrier(Shared(&used[s]), kWarps);
    }
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) return CopyWeights<kGated>(a, ring);
  AwaitEarlier();
  auto* sums = reinterpret_cast<float*>(memory + stages * kStageBytes);
  MultiplyItems<kGated>(a, ring, sums, reinterpret_cast<unsigned char*>(sums + 2 * kAllSums));
}

}  // namespace

bool Streams(const BackendContext& context, const Product& p) {
  return context.compute_capability >= 90 && context.max_shared_bytes >= kLeastSharedBytes &&
         Bf16InVectors(p) && p.in() % kSlice == 0 && p.rows() <= kStreamRows;
}

void MultiplyStream(BackendContext& context, const Product& p) {
  StreamArgs a;
  a.x = p.x.as<float>();
  a.x_stride = p.x.stride[0];
  a.weights = p.weight.as<Bf16>();
  a.up = p.up.as<Bf16>();
  a.weight_stride = p.weight.stride[0];
  a.out = p.out.as<float>();
  a.out_stride = p.out.stride[0];
  a.rows = static_cast<int>(p.rows());
  a.in = static_cast<int>(p.in());
  a.columns = static_cast<int>(p.columns());
  a.gelu = p.activation == Activation::kGeluTanh;
  // Whole steps, as few chunks as there is room for.
  int chunks = 1;
  do {
    a.chunk = chunks == 1 ? a.in : Blocks(a.in, chunks * kStep) * kStep;
    ++chunks;
  } while (2 * a.rows * PitchOf(a.chunk) > kMostXBytes);
  const int others = int{sizeof(float)} * 2 * kAllSums + 2 * a.rows * PitchOf(a.chunk);
  const int stages =
      std::min(kMostStages, (context.max_shared_bytes - kStaticBytes - others) / kStageBytes);
  CHECK_GE(stages, kLeastStages) << others << " bytes besides weights";
  const int bytes = stages * kStageBytes + others;
  const bool gated = a.up != nullptr;
  const auto kernel = gated ? Stream<true> : Stream<false>;
  Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
     "MatMul");
  const int most = gated ? kItemColumns / 2 : kItemColumns;
  const int blocks = std::min(context.sm_count, Blocks(a.columns, kLeastColumns));
  const int items = Blocks(a.columns, blocks * most);  // of a block
  a.each = Blocks(a.columns, blocks * items);
  LaunchEarlyWith(context, {.shared_bytes = bytes}, kernel, dim3(blocks), kThreads + kWarp, a,
                  stages);
}

}  // namespace longspan::cuda
