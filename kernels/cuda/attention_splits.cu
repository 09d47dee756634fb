// Partial results of a row's splits from bf16 keys and values, as fast as memory gives them: each
// warp keeps kStages loads of kWarpKeys keys and values under way, past the registers.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {
namespace {

using Bf16 = __nv_bfloat16;

constexpr int kWarps = 4;
constexpr int kKeyLanes = 8;  // lanes that share a key; each has 8 dims of every 64
constexpr int kWarpKeys = kWarp / kKeyLanes;
constexpr int kStepKeys = kWarps * kWarpKeys;
constexpr int kStages = 4;
constexpr int kVector = 8;  // elements of 16 bytes
constexpr int kChunk = kKeyLanes * kVector;

__device__ __forceinline__ void CopyAsync(uint4* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(Shared(to)), "l"(from));
}
__device__ __forceinline__ void Unpack(uint4 raw, float (&to)[kVector]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// Where the keys of one lane lie: it takes every kStepKeys-th from `j` on.
class Cursor {
 public:
  __device__ Cursor(const Problem& p, const Row& row, int kv_head, int j)
      : p_(p), row_(row), kv_head_(kv_head), j_(j) {
    slot_ = j / p.cache.page_tokens % p.cache.slots;
    in_page_ = j % p.cache.page_tokens;
  }
  __device__ int j() const { return j_; }
  __device__ void Locate(const Bf16** key, const Bf16** value) const {
    if (j_ >= row_.start) {
      const int64_t r = row_.flight + j_ - row_.start;
      *key = static_cast<const Bf16*>(p_.key) + r * p_.key_row + kv_head_ * p_.key_head;
      *value = static_cast<const Bf16*>(p_.value) + r * p_.value_row + kv_head_ * p_.value_head;
      return;
    }
    const int64_t unit = p_.cache.table[row_.sequence * p_.cache.table_stride + slot_];
    const std::byte* page = p_.cache.arena + kPageUnitBytes * unit;
    const int64_t at = (int64_t{kv_head_} * p_.cache.page_tokens + in_page_) * p_.dim;
    *key = reinterpret_cast<const Bf16*>(page + p_.cache.key_offset) + at;
    *value = reinterpret_cast<const Bf16*>(page + p_.cache.value_offset) + at;
  }
  __device__ void Advance() {
    j_ += kStepKeys;
    in_page_ += kStepKeys;
    while (in_page_ >= p_.cache.page_tokens) {
      in_page_ -= p_.cache.page_tokens;
      if (++slot_ == p_.cache.slots) slot_ = 0;
    }
  }

 private:
  const Problem& p_;
  const Row& row_;
  int kv_head_, j_, slot_, in_page_;
};

// grid: rows, KV heads times groups of kHeads query heads, splits. Each group of kKeyLanes lanes
// has a softmax of its own until the end.
template <int kChunks, int kHeads, bool kObserve>
__global__ void __launch_bounds__(kWarps* kWarp) Split(const Piece p) {
  extern __shared__ uint4 memory[];  // [warps, stages, key and value, chunks, lanes]
  const int row_index = p.first_row + blockIdx.x;
  const Row row(p, row_index);
  const int split = blockIdx.z;
  if (split >= row.splits) return;
  const int groups = (p.group + kHeads - 1) / kHeads;
  const int kv_head = blockIdx.y / groups;
  const int first_head = kv_head * p.group + blockIdx.y % groups * kHeads;
  const int heads = min(kHeads, (kv_head + 1) * p.group - first_head);
  const int begin = row.first + split * row.chunk;
  const int end = min(begin + row.chunk, row.position + 1);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, part = lane % kKeyLanes;
  const int first = begin + warp * kWarpKeys + lane / kKeyLanes;

  constexpr int kStageStride = 2 * kChunks * kWarp;
  uint4* own = memory + warp * kStages * kStageStride + lane;
  const auto has = [&](int c) { return c * kChunk + part * kVector < p.dim; };
  Cursor ahead(p, row, kv_head, first);
  const auto Fetch = [&](int stage) {
    if (ahead.j() < end) {
      const Bf16 *key, *value;
      ahead.Locate(&key, &value);
      uint4* to = own + stage * kStageStride;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        if (!has(c)) continue;
        CopyAsync(to + c * kWarp, key + c * kChunk + part * kVector);
        CopyAsync(to + (kChunks + c) * kWarp, value + c * kChunk + part * kVector);
      }
    }
    ahead.Advance();
    Commit();
  };
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) Fetch(s);

  float query[kHeads][kChunks][kVector], sum[kHeads][kChunks][kVector] = {};
  float highest[kHeads], total[kHeads] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float* from =
        p.query + row_index * p.query_row + (first_head + min(h, heads - 1)) * p.query_head;
    highest[h] = -INFINITY;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        query[h][c][i] = has(c) ? from[c * kChunk + part * kVector + i] * p.scale : 0.0f;
      }
    }
  }

  for (int j = first, stage = 0; j - lane / kKeyLanes < end; j += kStepKeys) {
    Fetch(stage == 0 ? kStages - 1 : stage - 1);
    Await<kStages - 1>();
    const uint4* from = own + stage * kStageStride;
    stage = stage == kStages - 1 ? 0 : stage + 1;
    float score[kHeads] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (j >= end || !has(c)) continue;
      float key[kVector];
      Unpack(from[c * kWarp], key);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) score[h] = fmaf(query[h][c][i], key[i], score[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int offset = kKeyLanes / 2; offset > 0; offset /= 2) {
        score[h] += __shfl_xor_sync(~0u, score[h], offset);
      }
    }
    if (j >= end) continue;
    float weight[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      const float s = Cap(score[h], p.softcap);
      if (kObserve && part == 0 && h < heads) {
        Scores(p, blockIdx.x, first_head + h)[j - row.first] = s;
      }
      const float most = fmaxf(highest[h], s);
      const float rescale = __expf(highest[h] - most);
      weight[h] = __expf(s - most);
      total[h] = total[h] * rescale + weight[h];
      highest[h] = most;
      if (rescale == 1.0f) continue;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) sum[h][c][i] *= rescale;
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (!has(c)) continue;
      float value[kVector];
      Unpack(from[(kChunks + c) * kWarp], value);
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          sum[h][c][i] = fmaf(weight[h], value[i], sum[h][c][i]);
        }
      }
    }
  }

  // The block's kStepKeys groups, merged in order, head by head.
  Await<0>();
  __shared__ float tops[kStepKeys], totals[kStepKeys];
  auto* sums = reinterpret_cast<float*>(memory);  // [groups, dims of whole chunks]
  constexpr int kWidth = kChunks * kChunk;
  const int group = threadIdx.x / kKeyLanes;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    __syncthreads();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      auto* to = reinterpret_cast<float4*>(sums + group * kWidth + c * kChunk + part * kVector);
      to[0] = make_float4(sum[h][c][0], sum[h][c][1], sum[h][c][2], sum[h][c][3]);
      to[1] = make_float4(sum[h][c][4], sum[h][c][5], sum[h][c][6], sum[h][c][7]);
    }
    if (part == 0) tops[group] = highest[h], totals[group] = total[h];
    __syncthreads();
    if (h >= heads) continue;
    float top = tops[0];
#pragma unroll
    for (int g = 1; g < kStepKeys; ++g) top = fmaxf(top, tops[g]);
    float factor[kStepKeys], all = 0;
#pragma unroll
    for (int g = 0; g < kStepKeys; ++g) {
      factor[g] = __expf(tops[g] - top);
      all += factor[g] * totals[g];
    }
    const int64_t index = (int64_t{blockIdx.x} * p.heads + first_head + h) * kMaxSplits + split;
    float* to = p.partial + index * (p.dim + 2);
    for (int d = threadIdx.x; d < p.dim; d += kWarps * kWarp) {
      float merged = 0;
#pragma unroll
      for (int g = 0; g < kStepKeys; ++g) merged += factor[g] * sums[g * kWidth + d];
      to[d] = merged;
    }
    if (threadIdx.x == 0) to[p.dim] = top, to[p.dim + 1] = all;
  }
}

template <int kChunks, int kHeads>
void Launch(BackendContext& context, const Piece& p, int rows) {
  constexpr int kBytes = kWarps * kStages * kWarp * 2 * kChunks * static_cast<int>(sizeof(uint4));
  static_assert(kBytes >= kStepKeys * kChunks * kChunk * static_cast<int>(sizeof(float)));
  const auto kernel =
      p.scores != nullptr ? Split<kChunks, kHeads, true> : Split<kChunks, kHeads, false>;
  Ok(context, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
     "Attention");
  const int groups = (p.group + kHeads - 1) / kHeads;
  const dim3 grid(rows, p.cache.kv_heads * groups, MostSplits(p));
  kernel<<<grid, kWarps * kWarp, kBytes, context.stream>>>(p);
}

// As many heads as registers hold beside the chunks.
template <int kChunks, int kMost>
void ForGroup(BackendContext& context, const Piece& p, int rows) {
  if (p.group == 1) {
    Launch<kChunks, 1>(context, p, rows);
  } else if (p.group == 2 || kMost == 2) {
    Launch<kChunks, 2>(context, p, rows);
  } else {
    Launch<kChunks, kMost>(context, p, rows);
  }
}

}  // namespace

bool SplitsInVectors(const Problem& p) {
  return p.cache.dtype == DType::kBF16 && p.whole_vectors && p.dim <= 4 * kChunk;
}

void AttendSplits(BackendContext& context, const Piece& p, int rows) {
  if (p.dim <= kChunk) {
    ForGroup<1, 8>(context, p, rows);
  } else if (p.dim <= 2 * kChunk) {
    ForGroup<2, 4>(context, p, rows);
  } else {
    ForGroup<4, 2>(context, p, rows);
  }
}

}  // namespace longspan::cuda
