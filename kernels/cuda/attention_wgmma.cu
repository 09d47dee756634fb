// Attention of many rows of a sequence at once on Hopper's asynchronous tensor cores, for models
// whose activations are bf16 on their way into products: queries and probabilities are rounded to
// bf16 too, keys and values are.
//
// A block takes 128 query rows of one KV head (the heads of its group, consecutive positions) with
// two warpgroups of 64 rows; a third brings blocks of keys and values, aligned to absolute
// positions, into a ring of shared memory, ahead of them. Each warpgroup multiplies the scores of
// the next block while it sums the values of this one, and computes exponentials meanwhile.
// As in attention_tiles.cu, what a row does not see adds exact zeros: a row's result depends
// neither on its neighbours nor on the chunk it arrived in.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/tensor_cores.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace longspan::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kGroups = 2;      // that compute
constexpr int kRows = kGroups * kGroupRows;
constexpr int kGroupThreads = 128;
constexpr int kThreads = (kGroups + 1) * kGroupThreads;
constexpr int kSlots = 4;  // of the ring; keys of a block, its values, keys of the next, …

// The form for heads of up to kDim channels, sizes in bytes.
template <int kDim>
struct Shape {
  static constexpr int keys = kDim > 128 ? 64 : 128;  // of a slot
  static constexpr int group_query = kGroupRows * kDim * 2;
  static constexpr int slot = keys * kDim * 2;
  static constexpr int ring = kGroups * group_query;
  static constexpr int barriers = ring + kSlots * slot;           // full, then empty
  static constexpr int total = barriers + 2 * kSlots * 8 + 1024;  // to begin at a multiple of 1024
};

#if defined(LONGSPAN_HAS_WGMMA)

// What the warps of a block know alike.
struct Block {
  Tile tile;
  int kv_head;
  int first_position, last_position;  // of its rows
  int first_key;                      // that any row sees
  int begin, end;                     // blocks of keys
  uint32_t memory, ring, full, empty;

  template <int kDim>
  __device__ static Block Of(const Problem& p, uint32_t memory) {
    using S = Shape<kDim>;
    Block b;
    b.tile = FindTile<kRows>(
        p, gridDim.x - 1 - blockIdx.x);  // the last rows see the most keys: they begin first
    b.kv_head = blockIdx.y;
    b.first_position = b.tile.start + b.tile.first / p.group;
    b.last_position = b.tile.start + (b.tile.first + b.tile.rows - 1) / p.group;
    b.first_key = p.window > 0 ? max(0, b.first_position - p.window + 1) : 0;
    b.begin = b.first_key / S::keys;
    b.end = b.last_position / S::keys + 1;
    b.memory = memory;
    b.ring = memory + S::ring;
    b.full = memory + S::barriers;
    b.empty = b.full + kSlots * 8;
    return b;
  }
};

// What all lanes have alike, so that compilers know it.
__device__ __forceinline__ int Uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// 2^x, to 2 ulp; a weight below the normal numbers is 0.
__device__ __forceinline__ float Power(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// The warpgroup that loads. A warp has the rows of a slot from warp * kWarpRows; a row is copied by
// kVectors lanes side by side.
template <int kDim>
__device__ __forceinline__ void LoadKeys(const Problem& p, const Block& b) {
  using S = Shape<kDim>;
  constexpr int kWarpRows = S::keys / 4, kVectors = kDim / 8, kAtOnce = kWarp / kVectors;
  static_assert(kWarpRows <= kWarp && kVectors <= kWarp);
  const int warp = threadIdx.x % kGroupThreads / kWarp, lane = threadIdx.x % kWarp;
  const int column = lane % kVectors * 8;
  int loads = 0;
  // Load number `i` has come: those who compute may use it.
  const auto Announce = [&](int i) {
    FenceForProducts();
    __syncwarp();
    if (lane == 0) Arrive(b.full + i % kSlots * 8);
  };
  int announced = 0;
  // This lane's rows of a block, keys and values: looked up while the block before is on its way.
  struct Source {
    uint64_t at[2];
    bool seen;
  };
  const auto Locate = [&](int block) {
    const int row = block * S::keys + warp * kWarpRows + lane % kWarpRows;
    Source source;
    source.seen = row >= b.first_key && row <= b.last_position;
    for (int values = 0; values < 2; ++values) {
      source.at[values] = reinterpret_cast<uint64_t>(
          At<bf16>(p, b.tile.sequence, b.tile.start, b.tile.flight, b.kv_head,
                   source.seen ? row : b.last_position, values != 0));
    }
    return source;
  };
  Source next = Locate(b.begin);
  for (int block = b.begin; block < b.end; ++block) {
    const Source source = next;
    if (block + 1 < b.end) next = Locate(block + 1);
#pragma unroll
    for (int values = 0; values < 2; ++values) {
      const int slot = loads % kSlots;
      const uint32_t empty = b.empty + slot * 8;
      const int parity = loads / kSlots % 2 ^ 1;
      if (!Passed(empty, parity)) {
        if (announced < loads) {
          Await<0>();
          Announce(announced++);
        }
        AwaitPhase(empty, parity);
      }
      const uint32_t to = b.ring + slot * S::slot;
#pragma unroll
      for (int i = 0; i < kWarpRows / kAtOnce; ++i) {
        const int row = i * kAtOnce + lane / kVectors;
        const uint64_t address = __shfl_sync(0xffffffffu, source.at[values], row);
        const bool valid = __shfl_sync(0xffffffffu, source.seen, row) && column < p.dim;
        CopyAsync(to + SwizzledAt(S::keys, warp * kWarpRows + row, column),
                  reinterpret_cast<const bf16*>(address) + (column < p.dim ? column : 0), valid);
      }
      Commit();
      ++loads;
      if (announced + 1 < loads) {
        Await<1>();
        Announce(announced++);
      }
    }
  }
  Await<0>();
  Announce(announced);
}

// A warpgroup that computes.
template <int kDim>
struct Rows {
  using S = Shape<kDim>;
  static constexpr int kScores = S::keys / 2;  // a thread's

  const Problem& p;
  const Block& b;
  const int group = Uniform(threadIdx.x / kGroupThreads);
  const int thread = threadIdx.x % kGroupThreads, lane = threadIdx.x % kWarp;
  int position[2];                                               // of this thread's rows
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // highest in powers of two
  float rescale[2];

  __device__ Rows(const Problem& problem, const Block& block) : p(problem), b(block) {
    for (int i = 0; i < 2; ++i) {
      position[i] = b.tile.start + (b.tile.first + min(Row(i), b.tile.rows - 1)) / p.group;
    }
  }

  // This thread's row i of the tile.
  __device__ int Row(int i) const {
    return group * kGroupRows + thread / kWarp * 16 + lane / 4 + i * 8;
  }
  __device__ uint32_t query() const { return b.memory + group * S::group_query; }
  __device__ void Release(int load) const {
    __syncwarp();
    if (lane == 0) Arrive(b.empty + load % kSlots * 8);
  }
  __device__ void AwaitLoad(int load) const {
    AwaitPhase(b.full + load % kSlots * 8, load / kSlots % 2);
  }

  __device__ void LoadQueries() const {
    const float scale = p.softcap > 0 ? p.scale : p.scale * kLog2E;
    constexpr int kVectors = kDim / 8;
#pragma unroll 8
    for (int i = thread; i < kGroupRows * kVectors; i += kGroupThreads) {
      const int r = i / kVectors, column = i % kVectors * 8;
      const int q = b.tile.first + group * kGroupRows + r;
      float4 x = {0, 0, 0, 0}, y = x;
      if (group * kGroupRows + r < b.tile.rows && column < p.dim) {
        const float* from = p.query + (b.tile.flight + q / p.group) * p.query_row +
                            (b.kv_head * p.group + q % p.group) * p.query_head + column;
        x = reinterpret_cast<const float4*>(from)[0];
        y = reinterpret_cast<const float4*>(from)[1];
      }
      const auto Pair = [&](float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low * scale, high * scale);
        return *reinterpret_cast<const uint32_t*>(&pair);
      };
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                       query() + SwizzledAt(kGroupRows, r, column)),
                   "r"(Pair(x.x, x.y)), "r"(Pair(x.z, x.w)), "r"(Pair(y.x, y.y)),
                   "r"(Pair(y.z, y.w))
                   : "memory");
    }
    FenceForProducts();
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
  }

  // Begins score = queries · keys of the load.
  __device__ __forceinline__ void MultiplyKeys(int load, float (&score)[kScores]) const {
    const uint64_t queries = AcrossColumns(query()),
                   keys = AcrossColumns(b.ring + load % kSlots * S::slot);
    FenceProducts();
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      const int chunk = d / kSwizzledColumns, within = d % kSwizzledColumns * 2;
      MultiplyShared(score, Further(queries, chunk * kGroupRows * 128 + within),
                     Further(keys, chunk * S::keys * 128 + within), d > 0);
    }
    CommitProducts();
  }

  // Begins sum += weights · values of the load.
  __device__ __forceinline__ void MultiplyValues(int load, const uint32_t (&weight)[kScores / 8][4],
                                                 float (&sum)[kDim / 2]) const {
    const uint64_t values = AcrossRows(b.ring + load % kSlots * S::slot, S::keys);
    FenceProducts();
#pragma unroll
    for (int k = 0; k < S::keys; k += 16) {
      MultiplyRegisters(sum, weight[k / 16], Further(values, k * 128));
    }
    CommitProducts();
  }

  // From scores of a block of keys to their weights, by the highest score so far; `rescale` is what
  // earlier sums must be multiplied by.
  __device__ __forceinline__ void Weigh(int block, float (&score)[kScores]) {
    if (p.softcap > 0) {
#pragma unroll
      for (float& x : score) x = Cap(x, p.softcap) * kLog2E;
    }
    const int base = block * S::keys;
    const bool all_seen = base + S::keys - 1 <= b.first_position &&
                          (p.window == 0 || base > b.last_position - p.window);
    if (!all_seen) {
      const int column = base + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
        const int j = column + n / 4 * 8 + n % 2, t = position[n / 2 % 2];
        if (j > t || (p.window > 0 && j <= t - p.window)) score[n] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = highest[i];
#pragma unroll
      for (int n = 0; n < kScores; n += 4) {
        most = fmaxf(most, fmaxf(score[n + 2 * i], score[n + 2 * i + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float from = most == -INFINITY ? 0 : most;  // nothing seen yet: every weight is 0
      rescale[i] = Power(highest[i] - from);
      highest[i] = most;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kScores; n += 4) {
        score[n + 2 * i] = Power(score[n + 2 * i] - from);
        score[n + 2 * i + 1] = Power(score[n + 2 * i + 1] - from);
        sum += score[n + 2 * i] + score[n + 2 * i + 1];
      }
      total[i] = total[i] * rescale[i] + sum;
    }
  }

  __device__ __forceinline__ void Pack(const float (&score)[kScores],
                                       uint32_t (&weight)[kScores / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kScores; n += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(score[n], score[n + 1]);
      weight[n / 8][n % 8 / 2] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }

  __device__ __forceinline__ void Run() {
    float sum[kDim / 2] = {};
    float score[kScores];
    uint32_t weight[kScores / 8][4];
    LoadQueries();

    // Loads alternate: 2 * n are the keys of the n-th block, 2 * n + 1 its values.
    AwaitLoad(0);
    MultiplyKeys(0, score);
    WaitProducts<0>(score);
    Release(0);
    Weigh(b.begin, score);
    Pack(score, weight);
    int load = 1;
    for (int block = b.begin + 1; block < b.end; ++block, load += 2) {
      AwaitLoad(load + 1);
      MultiplyKeys(load + 1, score);
      AwaitLoad(load);
      MultiplyValues(load, weight, sum);
      WaitProducts<1>(score);
      Release(load + 1);
      Weigh(block, score);
      WaitProducts<0>(sum);
      Release(load);
      if (__any_sync(0xffffffffu, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
        for (int n = 0; n < kDim / 2; ++n) sum[n] *= rescale[n / 2 % 2];
      }
      Pack(score, weight);
    }
    AwaitLoad(load);
    MultiplyValues(load, weight, sum);
    WaitProducts<0>(sum);
    Store(sum);
  }

  __device__ __forceinline__ void Store(const float (&sum)[kDim / 2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] += __shfl_xor_sync(0xffffffffu, total[i], 1);
      total[i] += __shfl_xor_sync(0xffffffffu, total[i], 2);
      if (Row(i) >= b.tile.rows) continue;
      const int q = b.tile.first + Row(i);
      const int64_t row = b.tile.flight + q / p.group;
      const int head = b.kv_head * p.group + q % p.group;
      float weight = 1;
      if (p.sinks != nullptr) {
        const float sink = p.sinks[head] * kLog2E, top = fmaxf(highest[i], sink);
        weight = exp2f(highest[i] - top);
        total[i] = total[i] * weight + exp2f(sink - top);
      }
      weight /= total[i];
      auto* to = static_cast<bf16*>(p.out) + row * p.out_row + head * p.out_head;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int d = n * 8 + lane % 4 * 2;
        if (d >= p.dim) continue;
        *reinterpret_cast<__nv_bfloat162*>(to + d) =
            __floats2bfloat162_rn(sum[4 * n + 2 * i] * weight, sum[4 * n + 2 * i + 1] * weight);
      }
    }
  }
};

#endif  // LONGSPAN_HAS_WGMMA

// grid: tiles, KV heads.
template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) Attend(const Problem p) {
#if defined(LONGSPAN_HAS_WGMMA)
  extern __shared__ unsigned char dynamic[];
  const Block b = Block::Of<kDim>(p, (Shared(dynamic) + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < kSlots; ++slot) {
      InitBarrier(b.full + slot * 8, kGroupThreads / kWarp);
      InitBarrier(b.empty + slot * 8, kGroups * kGroupThreads / kWarp);
    }
  }
  __syncthreads();
  if (threadIdx.x / kGroupThreads == kGroups) {
    KeepRegisters<56>();
    LoadKeys<kDim>(p, b);
  } else {
    TakeRegisters<224>();
    Rows<kDim>(p, b).Run();
  }
#endif
}

template <int kDim>
void Launch(BackendContext& context, const Problem& p, int tiles) {
  constexpr int bytes = Shape<kDim>::total;
  if (!Ok(context,
          cudaFuncSetAttribute(Attend<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "Attention")) {
    return;
  }
  Attend<kDim><<<dim3(tiles, p.cache.kv_heads), kThreads, bytes, context.stream>>>(p);
}

}  // namespace

bool AttendsInWgmma(const BackendContext& context, const Problem& p) {
#if defined(LONGSPAN_SM90A)
  return context.compute_capability == 90 && !context.deterministic && AttendsInTiles(p) &&
         p.half_out && reinterpret_cast<uintptr_t>(p.query) % 16 == 0 && p.query_row % 4 == 0 &&
         p.query_head % 4 == 0;
#else
  (void)context, (void)p;
  return false;
#endif
}

void AttendWgmma(BackendContext& context, const Problem& p) {
  CHECK(reinterpret_cast<uintptr_t>(p.out) % 4 == 0 && p.out_row % 2 == 0 && p.out_head % 2 == 0)
      << "out is written in pairs";
  const int tiles = CountTiles<kRows>(p);
  VisitHeadSize(p, [&](auto size) { Launch<size>(context, p, tiles); });
}

}  // namespace longspan::cuda
