// Attention of many rows of a sequence at once, on the tensor cores.
//
// A block takes 64 query rows of one KV head: the heads of its group and consecutive positions, so
// that a key and a value are read once for all of them. Keys come in blocks aligned to absolute
// positions and each row's softmax is online over them; what a row does not see adds exact zeros.
// So a row's result depends neither on its neighbours nor on the chunk it arrived in.
//
// Queries and probabilities are fp32 and the tensor cores take bf16: each is the sum of two bf16,
// which keeps 16 bits of it, at the price of twice the products. Keys and values are bf16 already.
//
// On a deterministic backend a step's every row comes here. Its keys are cut into splits aligned to
// absolute positions, each with a softmax of its own, and the splits join in order. Where memory
// holds what all splits leave, each is a block's and a second kernel joins them: decoding has
// enough blocks so. Else a block takes its splits one after another. The operations are the same.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kRows = 64;  // of a block; 16 a warp
constexpr int kThreads = kRows / 16 * kWarp;
constexpr int kMostGridZ = 65535;
constexpr int kFixedSplit = 256;  // keys: long enough to hide joining, short enough for decoding

// The form for heads of up to kDim channels, in shared memory rows padded by 16 bytes, so that
// ldmatrix meets no bank twice.
template <int kDim>
struct Shape {
  static constexpr int keys = kDim > 128 ? 32 : 64;  // of a stage; two stages
  static constexpr int split = kFixedSplit / keys;   // stages of a split
  static constexpr int stride = kDim + 8;
  static constexpr int query = kRows * stride;  // elements
  static constexpr int stage = keys * stride;
  static constexpr size_t bytes = sizeof(bf16) * (2 * query + 4 * stage);
};

// Where splits leave what they know.
struct Splits {
  int first_tile;  // of the launch
  // 0: a block takes a tile's splits in turn, and `memory` is for the sums of those before: [tiles
  // of the launch, KV heads, kDim / 8, kThreads], four numbers each. Else a block takes one, and
  // `memory` is [rows, heads, most, dim + 2]: sums, then top and total.
  int most;  // of a row
  float* memory;
};

// The first split that a row at this position sees.
__device__ __forceinline__ int FirstSplit(const Problem& p, int position) {
  return (p.window > 0 ? max(0, position - p.window + 1) : 0) / kFixedSplit;
}

// What a row's sums are multiplied with.
struct Factors {
  float before, next;
};

// The softmax of a row's keys so far, joined by that of the next; a top is in powers of two.
// Written as fmaf, so that it rounds alike in both kernels.
__device__ __forceinline__ Factors Join(float* top, float* total, float next_top,
                                        float next_total) {
  const float most = fmaxf(*top, next_top);
  if (most == -INFINITY) return {1, 0};
  const Factors by = {exp2f(*top - most), exp2f(next_top - most)};
  *total = fmaf(next_total, by.next, *total * by.before);
  *top = most;
  return by;
}
__device__ __forceinline__ float JoinSums(float before, float next, const Factors& by) {
  return fmaf(next, by.next, before * by.before);
}

// The total joined by the head's sink. Returns what the sums are multiplied with.
__device__ __forceinline__ float JoinSink(const Problem& p, int head, float top, float* total) {
  if (p.sinks == nullptr) return 1;
  const float sink = __fmul_rn(p.sinks[head], kLog2E), most = fmaxf(top, sink);
  const float weight = exp2f(top - most);
  *total = fmaf(*total, weight, exp2f(sink - most));
  return weight;
}

// grid: tiles, KV heads, splits of a tile if each is a block's. kFixed: in splits.
template <int kDim, bool kFixed>
__global__ void __launch_bounds__(kThreads) Attend(const Problem p, const Splits splits) {
  using S = Shape<kDim>;
  extern __shared__ __align__(16) unsigned char memory[];
  bf16* const query_high = reinterpret_cast<bf16*>(memory);
  bf16* const query_low = query_high + S::query;
  bf16* const stages = query_low + S::query;  // keys, values, keys, values

  // The last rows see the most keys: they begin first.
  const Tile tile = FindTile<kRows>(p, splits.first_tile + gridDim.x - 1 - blockIdx.x);
  const int kv_head = blockIdx.y;
  const int first_position = tile.start + tile.first / p.group;
  const int last_position = tile.start + (tile.first + tile.rows - 1) / p.group;
  const int first_key = p.window > 0 ? max(0, first_position - p.window + 1) : 0;
  int block = first_key / S::keys, end_block = last_position / S::keys + 1;
  if (kFixed && splits.most > 0) {
    const int split = first_key / kFixedSplit + static_cast<int>(blockIdx.z);
    block = max(block, split * S::split);
    end_block = min(end_block, (split + 1) * S::split);
    if (block >= end_block) return;
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const bool busy = !kFixed || warp * 16 < tile.rows;
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
    SplitBf16(x, y, reinterpret_cast<uint32_t*>(query_high + at),
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
    Commit();
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

  const auto Visit = [&](int block) {
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
        Multiply<bf16>(score[n / 8], high, b[0], b[1]);
        Multiply<bf16>(score[n / 8 + 1], high, b[2], b[3]);
        Multiply<bf16>(score[n / 8], low, b[0], b[1]);
        Multiply<bf16>(score[n / 8 + 1], low, b[2], b[3]);
      }
    }

    const int base = block * S::keys;
    if (p.softcap > 0) {
#pragma unroll
      for (auto& four : score) {
        for (float& x : four) x = __fmul_rn(Cap(x, p.softcap), kLog2E);
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
      float weights = 0;
#pragma unroll
      for (auto& four : sum) four[2 * i] *= rescale, four[2 * i + 1] *= rescale;
#pragma unroll
      for (auto& four : score) {
        four[2 * i] = exp2f(four[2 * i] - from);
        four[2 * i + 1] = exp2f(four[2 * i + 1] - from);
        weights += four[2 * i] + four[2 * i + 1];
      }
      total[i] = fmaf(total[i], rescale, weights);
    }

#pragma unroll
    for (int k = 0; k < S::keys; k += 16) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&w)[4] = score[k / 8 + half];
        SplitBf16(w[0], w[1], &high[2 * half], &low[2 * half]);
        SplitBf16(w[2], w[3], &high[2 * half + 1], &low[2 * half + 1]);
      }
#pragma unroll
      for (int d = 0; d < kDim; d += 16) {
        uint32_t b[4];
        LoadTransposed(b, values + (k + lane % 16) * S::stride + d + lane / 16 * 8);
        Multiply<bf16>(sum[d / 8], high, b[0], b[1]);
        Multiply<bf16>(sum[d / 8 + 1], high, b[2], b[3]);
        Multiply<bf16>(sum[d / 8], low, b[0], b[1]);
        Multiply<bf16>(sum[d / 8 + 1], low, b[2], b[3]);
      }
    }
  };

  // The lanes of a row have its total in parts.
  const auto SumTotals = [&] {
#pragma unroll
    for (float& part : total) {
      part += __shfl_xor_sync(0xffffffffu, part, 1);
      part += __shfl_xor_sync(0xffffffffu, part, 2);
    }
  };
  const auto RowOf = [&](int r) { return tile.flight + (tile.first + r) / p.group; };
  const auto HeadOf = [&](int r) { return kv_head * p.group + (tile.first + r) % p.group; };

  // The split's sums and softmax for JoinSplits.
  const auto Leave = [&](int split) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp * 16 + lane / 4 + i * 8, first = FirstSplit(p, position[i]);
      if (r >= tile.rows || split < first || split > position[i] / kFixedSplit) continue;
      const int64_t at = (int64_t{RowOf(r)} * p.heads + HeadOf(r)) * splits.most + split - first;
      float* const to = splits.memory + at * (p.dim + 2);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        const int d = n * 8 + column;
        if (d >= p.dim) continue;
        *reinterpret_cast<float2*>(to + d) = make_float2(sum[n][2 * i], sum[n][2 * i + 1]);
      }
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(to + p.dim) = make_float2(highest[i], total[i]);
      }
    }
  };

  // The splits before, joined by this one; what they know stays for the next or, if this is the
  // last, where a softmax without splits would be.
  float top_before[2] = {-INFINITY, -INFINITY}, total_before[2] = {0, 0};
  bool any_before = false;
  const auto JoinNext = [&](bool last) {
    const int64_t tile_and_head = int64_t{blockIdx.x} * gridDim.y + blockIdx.y;
    float4* const before =
        reinterpret_cast<float4*>(splits.memory) + tile_and_head * (kDim / 8) * kThreads;
    Factors by[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      by[i] = Join(&top_before[i], &total_before[i], highest[i], total[i]);
      highest[i] = last ? top_before[i] : -INFINITY;
      total[i] = last ? total_before[i] : 0;
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      float4* const memory = before + n * kThreads + threadIdx.x;
      const float4 old = any_before ? *memory : make_float4(0, 0, 0, 0);
      const float4 all = {JoinSums(old.x, sum[n][0], by[0]), JoinSums(old.y, sum[n][1], by[0]),
                          JoinSums(old.z, sum[n][2], by[1]), JoinSums(old.w, sum[n][3], by[1])};
      if (!last) *memory = all;
      sum[n][0] = last ? all.x : 0;
      sum[n][1] = last ? all.y : 0;
      sum[n][2] = last ? all.z : 0;
      sum[n][3] = last ? all.w : 0;
    }
    any_before = true;
  };

  LoadKeys(block);
  for (; block < end_block; ++block) {
    if (block + 1 < end_block) {
      LoadKeys(block + 1);
      Await<1>();
    } else {
      Await<0>();
    }
    __syncthreads();
    if (busy) Visit(block);
    const bool last = block + 1 == end_block;
    if (kFixed && busy && (last || (block + 1) % S::split == 0)) {
      SumTotals();
      if (splits.most > 0) {
        Leave(block / S::split);
      } else {
        JoinNext(last);
      }
    }
    __syncthreads();  // the next load overwrites what this block read
  }

  if (!kFixed) SumTotals();
  if (kFixed && splits.most > 0) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = warp * 16 + lane / 4 + i * 8;
    if (r >= tile.rows) continue;
    const int row = RowOf(r), head = HeadOf(r);
    const float weight = JoinSink(p, head, highest[i], &total[i]);
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

// grid: rows, heads.
__global__ void JoinSplits(const Problem p, const Splits splits) {
  const int row = blockIdx.x, head = blockIdx.y, position = Row(p, row).position;
  const int count = position / kFixedSplit - FirstSplit(p, position) + 1;
  const int stride = p.dim + 2;
  const float* from = splits.memory + (int64_t{row} * p.heads + head) * splits.most * stride;
  for (int d = threadIdx.x; d < p.dim; d += blockDim.x) {
    float top = -INFINITY, total = 0, sum = 0;
    for (int s = 0; s < count; ++s) {
      const float* next = from + s * stride;
      sum = JoinSums(sum, next[d], Join(&top, &total, next[p.dim], next[p.dim + 1]));
    }
    const float weight = JoinSink(p, head, top, &total);
    StoreOut<1>(p, row * p.out_row + head * p.out_head + d, {sum * weight / total});
  }
}

template <int kDim, bool kFixed>
void Launch(BackendContext& context, const Problem& p, const Splits& splits, int tiles) {
  constexpr size_t bytes = Shape<kDim>::bytes;
  const auto kernel = Attend<kDim, kFixed>;
  if (!Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "Attention")) {
    return;
  }
  kernel<<<dim3(tiles, p.cache.kv_heads, std::max(1, splits.most)), kThreads, bytes,
           context.stream>>>(p, splits);
}

// Of a tile, whatever its sequence's length: what a cache layer can hold bounds it.
int MostFixedSplits(const Problem& p) {
  const int64_t cached = int64_t{p.cache.slots} * p.cache.page_tokens;
  const int64_t seen = p.window > 0 ? p.window + kRows + kFixedSplit : cached + p.batch.rows;
  return static_cast<int>((seen + kFixedSplit - 1) / kFixedSplit);
}

template <int kDim>
void LaunchFixed(BackendContext& context, const Problem& p, int tiles) {
  constexpr size_t room = BackendContext::kWorkspaceBytes;
  Splits splits = {0, MostFixedSplits(p), static_cast<float*>(context.Workspace(room))};
  const size_t all = sizeof(float) * p.batch.rows * p.heads * splits.most * (p.dim + 2);
  if (splits.most > 1 && splits.most <= kMostGridZ && all <= room) {
    Launch<kDim, true>(context, p, splits, tiles);
    JoinSplits<<<dim3(p.batch.rows, p.heads), Blocks(p.dim, kWarp) * kWarp, 0, context.stream>>>(
        p, splits);
    return;
  }
  splits.most = 0;
  const auto most = static_cast<int>(room / (sizeof(float) * kRows * kDim * p.cache.kv_heads));
  CHECK_GT(most, 0);
  for (; splits.first_tile < tiles; splits.first_tile += most) {
    Launch<kDim, true>(context, p, splits, std::min(most, tiles - splits.first_tile));
  }
}

template <int kDim>
void LaunchFor(BackendContext& context, const Problem& p, int tiles) {
  if (context.deterministic) {
    LaunchFixed<kDim>(context, p, tiles);
  } else {
    Launch<kDim, false>(context, p, {}, tiles);
  }
}

}  // namespace

bool AttendsInTiles(const Problem& p) { return p.cache.dtype == DType::kBF16 && p.whole_vectors; }

void AttendTiles(BackendContext& context, const Problem& p) {
  CHECK(reinterpret_cast<uintptr_t>(p.out) % 8 == 0 && p.out_row % 2 == 0 && p.out_head % 2 == 0)
      << "out is written in pairs";
  const int tiles = CountTiles<kRows>(p);
  if (p.dim <= 64) {
    LaunchFor<64>(context, p, tiles);
  } else if (p.dim <= 96) {
    LaunchFor<96>(context, p, tiles);
  } else if (p.dim <= 128) {
    LaunchFor<128>(context, p, tiles);
  } else {
    LaunchFor<256>(context, p, tiles);
  }
}

}  // namespace longspan::cuda
