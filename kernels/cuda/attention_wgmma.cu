// Attention of many rows of a sequence at once on Hopper's asynchronous tensor cores, for models
// whose activations are bf16 on their way into products: queries and probabilities are rounded to
// bf16 too, keys and values are.
//
// A block takes 128 query rows of one KV head (the heads of its group, consecutive positions) with
// two warpgroups of 64 rows; a third brings blocks of keys and values, aligned to absolute
// positions, into a ring of shared memory, ahead of them. While a warpgroup turns scores into
// weights the tensor cores have the other's products. What it spends on that bounds it, so weights
// are not of the highest score seen: see Rows::from.
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

// The form for heads of up to kDim channels, sizes in bytes.
template <int kDim>
struct Shape {
  static constexpr int keys = kDim > 128 ? 64 : 128;   // of a slot
  static constexpr int held = kDim > 128 ? 64 : kDim;  // channels of queries in registers
  static constexpr int group_query = kGroupRows * (kDim - held) * 2;
  // Of the ring; keys of a block, its values, keys of the next, … As many as fit: with 4 instead of
  // 5 heads of 256 were read at 526 TFLOP/s for 597, with 5 instead of 7 heads of 128 at 611 for
  // 620.
  static constexpr int slots = kDim > 128 ? 5 : 7;
  static constexpr int slot = keys * kDim * 2;
  static constexpr int ring = kGroups * group_query;
  static constexpr int barriers = ring + slots * slot;           // full, then empty
  static constexpr int total = barriers + 2 * slots * 8 + 1024;  // to begin at a multiple of 1024
};

#if defined(LONGSPAN_HAS_WGMMA)

// A thread's. With 40 for those who load, 232 for others: 615 TFLOP/s for 655, heads of 256, H100.
constexpr int kRegisters = 224, kLoaderRegisters = 56;

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
    b.empty = b.full + S::slots * 8;
    return b;
  }
};

// What all lanes have alike, so that compilers know it.
__device__ __forceinline__ int Uniform(int value) { return __shfl_sync(~0u, value, 0); }

// 2^x, to 2 ulp; a weight below the normal numbers is 0.
__device__ __forceinline__ float Power(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Without branches, to 2e-7.
__device__ __forceinline__ float Tanh(float x) {
  return 1 - __fdividef(2, Power(2 * kLog2E * x) + 1);
}

// A block's keys or values lie evenly in runs of so many positions, nearly everywhere.
constexpr int kRun = 16;

// Of each block of `keys` positions a lane's run, and where it begins.
class Run {
 public:
  const bf16* at[2];  // keys, values; nullptr: not all rows are seen, or they do not lie evenly

  // `first`: the run's first position, in the first block.
  __device__ Run(const Problem& problem, const Block& block, int keys, int first)
      : p_(problem),
        b_(block),
        keys_(keys),
        pages_of_keys_(keys / p_.cache.page_tokens),
        rest_of_keys_(keys % p_.cache.page_tokens),
        pages_(p_.cache.table + b_.tile.sequence * p_.cache.table_stride),
        position_(first),
        slot_(first / p_.cache.page_tokens % p_.cache.slots),
        in_page_(first % p_.cache.page_tokens),
        page_(pages_[slot_]) {}

  // From block to block: `at` is of the one that the run was in, and the next one's page is asked
  // for.
  __device__ __forceinline__ void Next() {
    Locate();
    position_ += keys_;
    slot_ += pages_of_keys_;
    in_page_ += rest_of_keys_;
    if (in_page_ >= p_.cache.page_tokens) in_page_ -= p_.cache.page_tokens, ++slot_;
    while (slot_ >= p_.cache.slots) slot_ -= p_.cache.slots;
    page_ = pages_[slot_];
  }

 private:
  __device__ __forceinline__ void Locate() {
    at[0] = at[1] = nullptr;
    const int end = position_ + kRun;
    if (position_ < b_.first_key || end > b_.last_position + 1) return;
    if (position_ >= b_.tile.start) {
      const int64_t row = b_.tile.flight + position_ - b_.tile.start;
      at[0] = static_cast<const bf16*>(p_.key) + row * p_.key_row + b_.kv_head * p_.key_head;
      at[1] = static_cast<const bf16*>(p_.value) + row * p_.value_row + b_.kv_head * p_.value_head;
    } else if (end <= b_.tile.start && p_.cache.page_tokens % kRun == 0) {
      const int64_t row = b_.kv_head * p_.cache.page_tokens + in_page_;
      const std::byte* page = p_.cache.arena + kPageUnitBytes * static_cast<int64_t>(page_);
      at[0] = reinterpret_cast<const bf16*>(page + p_.cache.key_offset) + row * p_.dim;
      at[1] = reinterpret_cast<const bf16*>(page + p_.cache.value_offset) + row * p_.dim;
    }
  }

  const Problem& p_;
  const Block& b_;
  const int keys_, pages_of_keys_, rest_of_keys_;
  const int32_t* const pages_;
  int position_, slot_, in_page_;
  int32_t page_;
};

// The warpgroup that loads. A warp has the rows of a slot from first_row on; a row is copied by
// kVectors lanes side by side. How many instructions a copy takes decides how fast prompts are
// read.
template <int kDim>
__device__ __forceinline__ void LoadKeys(const Problem& p, const Block& b) {
  using S = Shape<kDim>;
  constexpr int kWarpRows = S::keys / 4, kRuns = kWarpRows / kRun;
  constexpr int kVectors = kDim / 8, kAtOnce = kWarp / kVectors;
  static_assert(kWarpRows % kRun == 0 && kRun % kAtOnce == 0 && kVectors <= kWarp);
  const int first_row = threadIdx.x % kGroupThreads / kWarp * kWarpRows, lane = threadIdx.x % kWarp;
  const int lane_row = lane / kVectors, lane_column = lane % kVectors * 8;
  const bool inside = lane_column < p.dim;
  const int column = inside ? lane_column : 0;
  const uint32_t lane_to = first_row * 128 + SwizzledAt(S::keys, lane_row, lane_column);
  Run lane_run(p, b, S::keys, b.begin * S::keys + first_row + lane % kRuns * kRun);
  int load = 0;
  for (int block = b.begin; block < b.end; ++block) {
    lane_run.Next();
#pragma unroll
    for (int values = 0; values < 2; ++values, ++load) {
      const int slot = load % S::slots;
      AwaitPhase(b.empty + slot * 8, load / S::slots % 2 ^ 1);
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const uint32_t to = b.ring + slot * S::slot + lane_to + run * kRun * 128;
        // To the run's row i + lane_row; what is not `seen` becomes zeros.
        const auto Copy = [&](int i, const bf16* row, bool seen) {
          CopyAsync((to ^ i % 8 * 16) + i * 128, row + column, seen);
        };
        const int j = block * S::keys + first_row + run * kRun;
        const auto* begin = reinterpret_cast<const bf16*>(
            __shfl_sync(~0u, reinterpret_cast<uint64_t>(lane_run.at[values]), run));
        const int64_t stride = j < b.tile.start ? p.dim : values != 0 ? p.value_row : p.key_row;
        if (begin == nullptr) {
#pragma unroll 1
          for (int i = 0; i < kRun; i += kAtOnce) {
            const int at = j + i + lane_row;
            const bool seen = at >= b.first_key && at <= b.last_position;
            Copy(i,
                 At<bf16>(p, b.tile.sequence, b.tile.start, b.tile.flight, b.kv_head,
                          seen ? at : b.last_position, values != 0),
                 seen && inside);
          }
          continue;
        }
        const bf16* row = begin + lane_row * stride;
        if (stride == kDim) {
#pragma unroll
          for (int i = 0; i < kRun; i += kAtOnce) Copy(i, row + i * kDim, true);
        } else {
#pragma unroll
          for (int i = 0; i < kRun; i += kAtOnce) Copy(i, row + i * stride, inside);
        }
      }
      ArriveBehindCopies(b.full + slot * 8);
    }
  }
  AwaitCopies();
}

// A warpgroup that computes.
template <int kDim>
struct Rows {
  using S = Shape<kDim>;
  static constexpr int kScores = S::keys / 2;  // a thread's
  static constexpr float kMost = 65536;        // of what weights of a block add up to, a thread's

  const Problem& p;
  const Block& b;
  const int group = Uniform(threadIdx.x / kGroupThreads);
  const int thread = threadIdx.x % kGroupThreads, lane = threadIdx.x % kWarp;
  int position[2];  // of this thread's rows
  // Weights are 2^(score - from). `from` becomes the highest of a block's scores once their weights
  // add up to more than kMost: until then no weight waits for the highest to be found, and no sum
  // is rescaled. bf16 keeps large weights as well as small ones, and sums are fp32. At first all
  // that a row sees weighs too much, and what it does not nothing.
  float from[2] = {-1e30f, -1e30f};
  float total[2][2] = {};          // of weights, in two parts
  uint32_t held[S::held / 16][4];  // queries, of the first channels

  __device__ Rows(const Problem& problem, const Block& block) : p(problem), b(block) {
    for (int i = 0; i < 2; ++i) {
      position[i] = b.tile.start + (b.tile.first + min(Row(i), b.tile.rows - 1)) / p.group;
    }
  }

  // This thread's row i of the tile.
  __device__ int Row(int i) const {
    return group * kGroupRows + thread / kWarp * 16 + lane / 4 + i * 8;
  }
  __device__ uint32_t shared_query() const { return b.memory + group * S::group_query; }
  __device__ void Release(int load) const {
    __syncwarp();
    if (lane == 0) Arrive(b.empty + load % S::slots * 8);
  }
  // What copies wrote is for products once FenceForProducts() follows.
  __device__ void AwaitLoad(int load) const {
    AwaitPhase(b.full + load % S::slots * 8, load / S::slots % 2);
  }
  // Whether it is so for any thread of the warpgroup, of which all must ask.
  __device__ __forceinline__ bool Any(bool is) const {
    uint32_t any;
    asm volatile(
        "{ .reg .pred p, q; setp.ne.b32 p, %1, 0; barrier.cta.red.or.pred q, %2, %3, p; "
        "selp.b32 %0, 1, 0, q; }"
        : "=r"(any)
        : "r"(static_cast<uint32_t>(is)), "r"(group + 1), "n"(kGroupThreads)
        : "memory");
    return any != 0;
  }

  // Queries times the scale: to registers, which spares the tensor cores reading them from shared
  // memory again and again, and to there what registers do not hold.
  __device__ void LoadQueries() {
    const float scale = p.softcap > 0 ? p.scale : p.scale * kLog2E;
    const auto Pair = [&](float x, float y) { return PackBf16(x * scale, y * scale); };
    // Of the tile's row r.
    const auto Query = [&](int r) {
      const int q = b.tile.first + r;
      return p.query + (b.tile.flight + q / p.group) * p.query_row +
             (b.kv_head * p.group + q % p.group) * p.query_head;
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool is = Row(i) < b.tile.rows;
      const float* query = Query(min(Row(i), b.tile.rows - 1));
#pragma unroll
      for (int n = 0; n < S::held / 8; ++n) {
        const int column = n * 8 + lane % 4 * 2;
        float2 x = {0, 0};
        if (is && column < p.dim) x = *reinterpret_cast<const float2*>(query + column);
        held[n / 2][n % 2 * 2 + i] = Pair(x.x, x.y);
      }
    }
    if constexpr (S::held < kDim) {
      constexpr int kVectors = (kDim - S::held) / 8;
#pragma unroll 8
      for (int i = thread; i < kGroupRows * kVectors; i += kGroupThreads) {
        const int r = i / kVectors, column = i % kVectors * 8;
        float4 x = {0, 0, 0, 0}, y = x;
        if (group * kGroupRows + r < b.tile.rows && S::held + column < p.dim) {
          const float* query = Query(group * kGroupRows + r) + S::held + column;
          x = reinterpret_cast<const float4*>(query)[0];
          y = reinterpret_cast<const float4*>(query)[1];
        }
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                         shared_query() + SwizzledAt(kGroupRows, r, column)),
                     "r"(Pair(x.x, x.y)), "r"(Pair(x.z, x.w)), "r"(Pair(y.x, y.y)),
                     "r"(Pair(y.z, y.w))
                     : "memory");
      }
      FenceForProducts();
      Any(false);
    }
  }

  // Begins score = queries · keys of the load.
  __device__ __forceinline__ void MultiplyKeys(int load, float (&score)[kScores]) const {
    const uint64_t queries = AcrossColumns(shared_query()),
                   keys = AcrossColumns(b.ring + load % S::slots * S::slot);
    FenceProducts();
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      const auto At = [&](uint64_t matrix, int rows, int column) {
        return Further(matrix,
                       column / kSwizzledColumns * rows * 128 + column % kSwizzledColumns * 2);
      };
      const uint64_t of_keys = At(keys, S::keys, d);
      if (d < S::held) {
        MultiplyRegisters<false>(score, held[d < S::held ? d / 16 : 0], of_keys, d > 0);
      } else {
        MultiplyShared(score, At(queries, kGroupRows, d - S::held), of_keys, d > 0);
      }
    }
    CommitProducts();
  }

  // Begins sum += weights · values of the load.
  __device__ __forceinline__ void MultiplyValues(int load, const uint32_t (&weight)[kScores / 8][4],
                                                 float (&sum)[kDim / 2]) const {
    const uint64_t values = AcrossRows(b.ring + load % S::slots * S::slot, S::keys);
    FenceProducts();
#pragma unroll
    for (int k = 0; k < S::keys; k += 16) {
      MultiplyRegisters<true>(sum, weight[k / 16], Further(values, k * 128), true);
    }
    CommitProducts();
  }

  // What a score is before it is weighed: capped, -inf where a row does not see the key.
  __device__ __forceinline__ void Finish(int block, float (&score)[kScores]) const {
    if (p.softcap > 0) {
#pragma unroll
      for (float& x : score) x = kLog2E * p.softcap * Tanh(x / p.softcap);
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
  }

  // Scores kBegin to kEnd become weights, which are added to `sums`, in two parts a row.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void Weigh(float (&score)[kScores], float (&sums)[2][2]) const {
#pragma unroll
    for (int n = kBegin; n < kEnd; n += 2) {
      const int i = n / 2 % 2;
      score[n] = Power(score[n] - from[i]);
      score[n + 1] = Power(score[n + 1] - from[i]);
      sums[i][n / 4 % 2] += score[n] + score[n + 1];
    }
  }

  // Moves `from` of the rows that are `over` in any thread; earlier sums must be multiplied by
  // `rescale`.
  __device__ __forceinline__ void Raise(const float (&score)[kScores], const bool (&over)[2],
                                        float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 2 * i; n < kScores; n += 4) top = fmaxf(top, fmaxf(score[n], score[n + 1]));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      int any = over[i];
      any |= __shfl_xor_sync(~0u, any, 1);
      any |= __shfl_xor_sync(~0u, any, 2);
      const float to = any && top > from[i] ? top : from[i];
      rescale[i] = Power(from[i] - to);
      from[i] = to;
    }
  }

  template <int kBegin, int kEnd>
  __device__ __forceinline__ void Pack(const float (&score)[kScores],
                                       uint32_t (&weight)[kScores / 8][4]) const {
#pragma unroll
    for (int n = kBegin; n < kEnd; n += 2) {
      weight[n / 8][n % 8 / 2] = PackBf16(score[n], score[n + 1]);
    }
  }

  __device__ __forceinline__ void Attend() {
    float sum[kDim / 2] = {};
    float score[kScores];
    uint32_t weight[kScores / 8][4];
    constexpr int kHalf = kScores / 2;
    LoadQueries();

    // Loads alternate: 2 * n are the keys of the n-th block, 2 * n + 1 its values.
    AwaitLoad(0);
    FenceForProducts();
    MultiplyKeys(0, score);
    WaitProducts<0>(score);
    Release(0);
    Finish(b.begin, score);
    float rescale[2];
    Raise(score, {true, true}, rescale);
    Weigh<0, kScores>(score, total);
    Pack<0, kScores>(score, weight);
    int load = 1;
    for (int block = b.begin + 1; block < b.end; ++block, load += 2) {
      AwaitLoad(load);
      AwaitLoad(load + 1);
      FenceForProducts();
      MultiplyKeys(load + 1, score);
      MultiplyValues(load, weight, sum);
      WaitProducts<1>(score);
      Finish(block, score);
      float added[2][2] = {};
      Weigh<0, kHalf>(score, added);
      WaitProducts<0>(sum);
      Release(load);
      Pack<0, kHalf>(score, weight);
      Weigh<kHalf, kScores>(score, added);
      bool over[2];
      for (int i = 0; i < 2; ++i) over[i] = !(added[i][0] < kMost && added[i][1] < kMost);
      if (Any(over[0] || over[1])) {  // weights may be infinite: back to the scores
        MultiplyKeys(load + 1, score);
        WaitProducts<0>(score);
        Finish(block, score);
        Raise(score, over, rescale);
        for (int i = 0; i < 2; ++i) {
          for (int k = 0; k < 2; ++k) total[i][k] *= rescale[i], added[i][k] = 0;
        }
#pragma unroll
        for (int n = 0; n < kDim / 2; ++n) sum[n] *= rescale[n / 2 % 2];
        Weigh<0, kScores>(score, added);
        Pack<0, kHalf>(score, weight);
      }
      Release(load + 1);
      for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 2; ++k) total[i][k] += added[i][k];
      }
      Pack<kHalf, kScores>(score, weight);
    }
    AwaitLoad(load);
    FenceForProducts();
    MultiplyValues(load, weight, sum);
    WaitProducts<0>(sum);
    Store(sum);
  }

  __device__ __forceinline__ void Store(const float (&sum)[kDim / 2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float of_row = total[i][0] + total[i][1];
      of_row += __shfl_xor_sync(~0u, of_row, 1);
      of_row += __shfl_xor_sync(~0u, of_row, 2);
      if (Row(i) >= b.tile.rows) continue;
      const int q = b.tile.first + Row(i);
      const int64_t row = b.tile.flight + q / p.group;
      const int head = b.kv_head * p.group + q % p.group;
      float weight = 1;
      if (p.sinks != nullptr) {
        const float sink = p.sinks[head] * kLog2E, top = fmaxf(from[i], sink);
        weight = exp2f(from[i] - top);
        of_row = of_row * weight + exp2f(sink - top);
      }
      weight /= of_row;
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
    using S = Shape<kDim>;
    for (int slot = 0; slot < S::slots; ++slot) {
      InitBarrier(b.full + slot * 8, kGroupThreads);
      InitBarrier(b.empty + slot * 8, kGroups * kGroupThreads / kWarp);
    }
  }
  __syncthreads();
  if (threadIdx.x / kGroupThreads == kGroups) {
    KeepRegisters<kLoaderRegisters>();
    LoadKeys<kDim>(p, b);
  } else {
    TakeRegisters<kRegisters>();
    Rows<kDim>(p, b).Attend();
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
  CHECK_GT(p.cache.slots, 0);
  const int tiles = CountTiles<kRows>(p);
  VisitHeadSize(p, [&](auto size) { Launch<size>(context, p, tiles); });
}

}  // namespace longspan::cuda
