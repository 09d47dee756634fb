// Attention of many rows of a sequence at once, on the tensor cores.
//
// A block takes 64 query rows of one KV head: the heads of its group and consecutive positions, so
// that a key and a value are read once for all of them. Keys come in blocks aligned to absolute
// positions and each row's softmax is online over them; what a row does not see adds exact zeros.
// So a row's result depends neither on its neighbours nor on the chunk it arrived in.
//
// Queries and probabilities are fp32 and the tensor cores take bf16: each is the sum of two bf16,
// which keeps 16 bits of it, at the price of twice the products. Keys and values are bf16 already.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/check_cuda.h"

namespace longspan::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kRows = 64;  // of a block; 16 a warp
constexpr int kThreads = kRows / 16 * kWarp;
constexpr float kLog2E = 1.4426950408889634f;

// The form for heads of up to kDim channels, in shared memory rows padded by 16 bytes, so that
// ldmatrix meets no bank twice.
template <int kDim>
struct Shape {
  static constexpr int keys = kDim > 128 ? 32 : 64;  // of a stage; two stages
  static constexpr int stride = kDim + 8;
  static constexpr int query = kRows * stride;  // elements
  static constexpr int stage = keys * stride;
  static constexpr size_t bytes = sizeof(bf16) * (2 * query + 4 * stage);
};

__device__ __forceinline__ uint32_t Shared(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrices(uint32_t (&to)[4], const bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(Shared(row)));
}
__device__ __forceinline__ void LoadTransposed(uint32_t (&to)[4], const bf16* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(Shared(row)));
}

// sum[16, 8] += a[16, 16] · b[16, 8]
__device__ __forceinline__ void Multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t Pack(bf16 low, bf16 high) {
  return static_cast<uint32_t>(__bfloat16_as_ushort(low)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}

// x and y as a pair of bf16 and the pair of what that leaves of them.
__device__ __forceinline__ void Split(float x, float y, uint32_t* high, uint32_t* low) {
  const bf16 hx = __float2bfloat16_rn(x), hy = __float2bfloat16_rn(y);
  *high = Pack(hx, hy);
  *low = Pack(__float2bfloat16_rn(x - __bfloat162float(hx)),
              __float2bfloat16_rn(y - __bfloat162float(hy)));
}

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void CopyAsync(bf16* to, const bf16* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(Shared(to)), "l"(from),
               "r"(valid ? 16 : 0));
}

// Which rows a block has.
struct Tile {
  int sequence, start, flight;  // as in At
  int first, rows;              // the first of its sequence's query rows, and how many it has
};

// Tiles in the order of sequences; of a sequence with few rows none.
__device__ Tile Find(const Problem& p, int index) {
  for (int s = 0;; ++s) {
    const int begin = p.batch.row_begin[s], rows = p.batch.row_begin[s + 1] - begin;
    if (rows < kTileRows) continue;
    const int tiles = (rows * p.group + kRows - 1) / kRows;
    if (index < tiles) {
      const int first = index * kRows;
      return {s, p.batch.start[s], begin, first, min(kRows, rows * p.group - first)};
    }
    index -= tiles;
  }
}

// grid: tiles, KV heads. Query row r of a sequence is head r % group of the KV head at position
// start + r / group.
template <int kDim>
__global__ void __launch_bounds__(kThreads) Attend(const Problem p) {
  using S = Shape<kDim>;
  extern __shared__ __align__(16) unsigned char memory[];
  bf16* const query_high = reinterpret_cast<bf16*>(memory);
  bf16* const query_low = query_high + S::query;
  bf16* const stages = query_low + S::query;  // keys, values, keys, values

  // The last rows see the most keys: they begin first.
  const Tile tile = Find(p, gridDim.x - 1 - blockIdx.x);
  const int kv_head = blockIdx.y;
  const int first_position = tile.start + tile.first / p.group;
  const int last_position = tile.start + (tile.first + tile.rows - 1) / p.group;
  const int first_key = p.window > 0 ? max(0, first_position - p.window + 1) : 0;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float scale = p.softcap > 0 ? p.scale : p.scale * kLog2E;

  for (int i = threadIdx.x; i < kRows * kDim / 2; i += kThreads) {
    const int r = i / (kDim / 2), d = i % (kDim / 2) * 2;
    float x = 0, y = 0;
    if (r < tile.rows && d < p.dim) {
      const int row = (tile.first + r) / p.group, head = (tile.first + r) % p.group;
      const float* from = p.query + (tile.flight + row) * p.query_row +
                          (kv_head * p.group + head) * p.query_head + d;
      x = from[0] * scale;
      y = from[1] * scale;
    }
    const int at = r * S::stride + d;
    Split(x, y, reinterpret_cast<uint32_t*>(query_high + at),
          reinterpret_cast<uint32_t*>(query_low + at));
  }

  const auto LoadKeys = [&](int block) {
    bf16* const to = stages + block % 2 * 2 * S::stage;
    constexpr int kVectors = kDim / 8;
    for (int i = threadIdx.x; i < S::keys * kVectors; i += kThreads) {
      const int k = i / kVectors, d = i % kVectors * 8;
      const int j = block * S::keys + k;
      const bool valid = j >= first_key && j <= last_position && d < p.dim;
      const int from = valid ? j : last_position, channel = valid ? d : 0;
      const bf16* key =
          At<bf16>(p, tile.sequence, tile.start, tile.flight, kv_head, from, false) + channel;
      const bf16* value =
          At<bf16>(p, tile.sequence, tile.start, tile.flight, kv_head, from, true) + channel;
      CopyAsync(to + k * S::stride + d, key, valid);
      CopyAsync(to + S::stage + k * S::stride + d, value, valid);
    }
    asm volatile("cp.async.commit_group;");
  };

  // Lane l has two rows of its warp's 16, l / 4 and l / 4 + 8, and of every 8 columns the two from
  // l % 4 * 2: the tensor cores' form of sums.
  int position[2];
  for (int i = 0; i < 2; ++i) {
    const int r = min(warp * 16 + lane / 4 + i * 8, tile.rows - 1);
    position[i] = tile.start + (tile.first + r) / p.group;
  }
  const int column = lane % 4 * 2;
  float sum[kDim / 8][4] = {};
  float highest[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // highest in powers of two

  const int end_block = last_position / S::keys + 1;
  int block = first_key / S::keys;
  LoadKeys(block);
  for (; block < end_block; ++block) {
    if (block + 1 < end_block) {
      LoadKeys(block + 1);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    const bf16* const keys = stages + block % 2 * 2 * S::stage;
    const bf16* const values = keys + S::stage;

    float score[S::keys / 8][4] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 16) {
      uint32_t high[4], low[4];
      const int at = (warp * 16 + lane % 16) * S::stride + d + lane / 16 * 8;
      LoadMatrices(high, query_high + at);
      LoadMatrices(low, query_low + at);
#pragma unroll
      for (int n = 0; n < S::keys; n += 16) {
        uint32_t b[4];
        LoadMatrices(b, keys + (n + lane % 8 + lane / 16 * 8) * S::stride + d + lane / 8 % 2 * 8);
        Multiply(score[n / 8], high, b[0], b[1]);
        Multiply(score[n / 8 + 1], high, b[2], b[3]);
        Multiply(score[n / 8], low, b[0], b[1]);
        Multiply(score[n / 8 + 1], low, b[2], b[3]);
      }
    }

    const int base = block * S::keys;
    if (p.softcap > 0) {
#pragma unroll
      for (auto& four : score) {
        for (float& x : four) x = Cap(x, p.softcap) * kLog2E;
      }
    }
    const bool all_seen =
        base + S::keys - 1 <= first_position && (p.window == 0 || base > last_position - p.window);
    if (!all_seen) {
#pragma unroll
      for (int n = 0; n < S::keys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = base + n * 8 + column + i % 2, t = position[i / 2];
          if (j > t || (p.window > 0 && j <= t - p.window)) score[n][i] = -INFINITY;
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float most = highest[i];
#pragma unroll
      for (auto& four : score) most = fmaxf(most, fmaxf(four[2 * i], four[2 * i + 1]));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      const float from = most == -INFINITY ? 0 : most;  // nothing seen yet: every weight is 0
      const float rescale = exp2f(highest[i] - from);
      highest[i] = most;
      total[i] *= rescale;
#pragma unroll
      for (auto& four : sum) four[2 * i] *= rescale, four[2 * i + 1] *= rescale;
#pragma unroll
      for (auto& four : score) {
        four[2 * i] = exp2f(four[2 * i] - from);
        four[2 * i + 1] = exp2f(four[2 * i + 1] - from);
        total[i] += four[2 * i] + four[2 * i + 1];
      }
    }

#pragma unroll
    for (int k = 0; k < S::keys; k += 16) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&w)[4] = score[k / 8 + half];
        Split(w[0], w[1], &high[2 * half], &low[2 * half]);
        Split(w[2], w[3], &high[2 * half + 1], &low[2 * half + 1]);
      }
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t b[4];
        LoadTransposed(b, values + (k + lane % 16) * S::stride + d + lane / 16 * 8);
        Multiply(sum[d / 8], high, b[0], b[1]);
        Multiply(sum[d / 8 + 1], high, b[2], b[3]);
        Multiply(sum[d / 8], low, b[0], b[1]);
        Multiply(sum[d / 8 + 1], low, b[2], b[3]);
      }
    }
    __syncthreads();  // the next load overwrites what this block read
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    total[i] += __shfl_xor_sync(0xffffffffu, total[i], 1);
    total[i] += __shfl_xor_sync(0xffffffffu, total[i], 2);
    const int r = warp * 16 + lane / 4 + i * 8;
    if (r >= tile.rows) continue;
    const int row = tile.flight + (tile.first + r) / p.group;
    const int head = kv_head * p.group + (tile.first + r) % p.group;
    float weight = 1;
    if (p.sinks != nullptr) {
      const float sink = p.sinks[head] * kLog2E, top = fmaxf(highest[i], sink);
      weight = exp2f(highest[i] - top);
      total[i] = total[i] * weight + exp2f(sink - top);
    }
    const int64_t to = row * p.out_row + head * p.out_head;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      const int d = n * 8 + column;
      if (d >= p.dim) continue;
      StoreOut<2>(p, to + d,
                  {sum[n][2 * i] * weight / total[i], sum[n][2 * i + 1] * weight / total[i]});
    }
  }
}

template <int kDim>
void Launch(BackendContext& context, const Problem& p, int tiles) {
  constexpr size_t bytes = Shape<kDim>::bytes;
  if (!Ok(context,
          cudaFuncSetAttribute(Attend<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "Attention")) {
    return;
  }
  Attend<kDim><<<dim3(tiles, p.cache.kv_heads), kThreads, bytes, context.stream>>>(p);
}

}  // namespace

bool AttendsInTiles(const Problem& p) { return p.cache.dtype == DType::kBF16 && p.whole_vectors; }

void AttendTiles(BackendContext& context, const Problem& p) {
  CHECK(reinterpret_cast<uintptr_t>(p.out) % 8 == 0 && p.out_row % 2 == 0 && p.out_head % 2 == 0)
      << "out is written in pairs";
  const int32_t* begin = p.batch.HostRowBegin();
  int tiles = 0;
  for (int s = 0; s < p.batch.sequences; ++s) {
    const int rows = begin[s + 1] - begin[s];
    if (rows >= kTileRows) tiles += (rows * p.group + kRows - 1) / kRows;
  }
  if (p.dim <= 64) {
    Launch<64>(context, p, tiles);
  } else if (p.dim <= 96) {
    Launch<96>(context, p, tiles);
  } else if (p.dim <= 128) {
    Launch<128>(context, p, tiles);
  } else {
    Launch<256>(context, p, tiles);
  }
}

}  // namespace longspan::cuda
