// Softmax attention over paged and ring caches, row by row; many rows of a sequence go to
// attention_tiles.cu. Bytes: each visible key and value once per KV head (once per 4 query heads of
// it); operations: 4 * head_dim per query head and key.
//
// A row's keys are cut into splits by the row's own length alone, so that its result depends
// neither on its neighbours nor on the chunk it arrived in. A block makes one split's partial
// result (attention_splits.cu where keys are bf16), a second kernel merges a row's splits in order,
// and a third looks at observed rows again with the softmax's total known.
#include <algorithm>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 4;  // of a partial block; they take its keys in turn
constexpr int kKeys = 4;   // of a warp at a time: loads in flight before the first is used
constexpr int kSpanWarps = 8;

template <class T>
__device__ __forceinline__ const T* At(const Problem& p, const Row& row, int kv_head, int j,
                                       bool values) {
  return At<T>(p, row.sequence, row.start, row.flight, kv_head, j, values);
}

// This lane's kPer elements of a row of `dim`: zero beyond its end.
template <class T, int kPer>
__device__ __forceinline__ void Load(const T* from, int dim, bool whole, float (&to)[kPer]) {
  const int d = static_cast<int>(threadIdx.x % kWarp) * kPer;
  struct alignas(sizeof(T) * kPer) Vector {
    T at[kPer];
  };
  if (whole) {
    if (d < dim) {
      const Vector v = *reinterpret_cast<const Vector*>(from + d);
#pragma unroll
      for (int i = 0; i < kPer; ++i) to[i] = ToFloat(v.at[i]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) to[i] = d + i < dim ? ToFloat(from[d + i]) : 0.0f;
}

template <int kPer>
__device__ __forceinline__ float Dot(const float (&a)[kPer], const float (&b)[kPer]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) sum = fmaf(a[i], b[i], sum);
  return WarpSum(sum);
}

// grid: rows, KV heads times groups of kHeads query heads, kMaxSplits.
template <class T, int kPer, int kHeads>
__global__ void __launch_bounds__(kWarps* kWarp) Partial(const Piece p) {
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
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  float query[kHeads][kPer], sum[kHeads][kPer] = {}, highest[kHeads], total[kHeads] = {};
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const int head = first_head + min(h, heads - 1);
    const float* from = p.query + row_index * p.query_row + head * p.query_head;
    Load<float, kPer>(from, p.dim, false, query[h]);
#pragma unroll
    for (int i = 0; i < kPer; ++i) query[h][i] *= p.scale;
    highest[h] = -INFINITY;
  }

  for (int j = begin + warp * kKeys; j < end; j += kWarps * kKeys) {
    float key[kKeys][kPer], value[kKeys][kPer];
#pragma unroll
    for (int k = 0; k < kKeys; ++k) {  // beyond the end the last key again, with no weight
      const int at = min(j + k, end - 1);
      Load<T, kPer>(At<T>(p, row, kv_head, at, false), p.dim, p.whole_vectors, key[k]);
      Load<T, kPer>(At<T>(p, row, kv_head, at, true), p.dim, p.whole_vectors, value[k]);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float score[kKeys], most = highest[h];
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        score[k] = Cap(Dot<kPer>(query[h], key[k]), p.softcap);
        if (j + k >= end) score[k] = -INFINITY;
        most = fmaxf(most, score[k]);
      }
      const float rescale = expf(highest[h] - most);
      highest[h] = most;
      total[h] *= rescale;
#pragma unroll
      for (int i = 0; i < kPer; ++i) sum[h][i] *= rescale;
#pragma unroll
      for (int k = 0; k < kKeys; ++k) {
        const float weight = expf(score[k] - most);
        total[h] += weight;
#pragma unroll
        for (int i = 0; i < kPer; ++i) sum[h][i] = fmaf(weight, value[k][i], sum[h][i]);
      }
    }
  }

  // The block's warps, merged in order.
  __shared__ float sums[kWarps][kWarp * kPer], tops[kWarps], totals[kWarps];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) sums[warp][lane * kPer + i] = sum[h][i];
    if (lane == 0) tops[warp] = highest[h], totals[warp] = total[h];
    __syncthreads();
    if (h < heads) {
      float top = tops[0];
      for (int w = 1; w < kWarps; ++w) top = fmaxf(top, tops[w]);
      const int64_t index = (int64_t{blockIdx.x} * p.heads + first_head + h) * kMaxSplits + split;
      float* to = p.partial + index * (p.dim + 2);
      for (int d = threadIdx.x; d < p.dim; d += kWarps * kWarp) {
        float all = 0;
        for (int w = 0; w < kWarps; ++w) all += expf(tops[w] - top) * sums[w][d];
        to[d] = all;
      }
      if (threadIdx.x == 0) {
        float all = 0;
        for (int w = 0; w < kWarps; ++w) all += expf(tops[w] - top) * totals[w];
        to[p.dim] = top;
        to[p.dim + 1] = all;
      }
    }
    __syncthreads();
  }
}

// grid: rows, heads.
__global__ void Merge(const Piece p) {
  const int row_index = p.first_row + blockIdx.x, head = blockIdx.y;
  const int splits = Row(p, row_index).splits;
  const int stride = p.dim + 2;
  const float* from = p.partial + (int64_t{blockIdx.x} * p.heads + head) * kMaxSplits * stride;
  float top = p.sinks != nullptr ? p.sinks[head] : -INFINITY;
  for (int s = 0; s < splits; ++s) top = fmaxf(top, from[s * stride + p.dim]);
  float total = p.sinks != nullptr ? expf(p.sinks[head] - top) : 0.0f;
  for (int s = 0; s < splits; ++s) {
    total += expf(from[s * stride + p.dim] - top) * from[s * stride + p.dim + 1];
  }
  for (int d = threadIdx.x; d < p.dim; d += blockDim.x) {
    float sum = 0;
    for (int s = 0; s < splits; ++s) {
      sum += expf(from[s * stride + p.dim] - top) * from[s * stride + d];
    }
    StoreOut<1>(p, row_index * p.out_row + head * p.out_head + d, {sum / total});
  }
  if (threadIdx.x == 0) p.log_total[int64_t{row_index} * p.heads + head] = top + logf(total);
}

// Sums over keys of one head of one observed row, each key's probability known.
struct Sums {
  float mass = 0, far = 0, sink = 0, distance = 0, entropy = 0, probe = 0, beyond = 0, bucket = 0;
  float top_score = -INFINITY;
  int top_key = 0;
};

// grid: observed rows, heads. Lane b of a warp keeps bucket b.
template <class T, int kPer>
__global__ void __launch_bounds__(kSpanWarps* kWarp) Observe(const Problem p) {
  const SpanRequest& request = p.spans;
  const int row_index = request.rows[blockIdx.x], head = blockIdx.y;
  const Row row(p, row_index);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float log_total = p.log_total[int64_t{row_index} * p.heads + head];
  const int probes_begin = request.probe_offsets != nullptr ? request.probe_offsets[blockIdx.x] : 0;
  const int probes_end =
      request.probe_offsets != nullptr ? request.probe_offsets[blockIdx.x + 1] : 0;
  float query[kPer];
  Load<float, kPer>(p.query + row_index * p.query_row + head * p.query_head, p.dim, false, query);
#pragma unroll
  for (int i = 0; i < kPer; ++i) query[i] *= p.scale;

  Sums sums;
  for (int j = row.first + warp; j <= row.position; j += kSpanWarps) {
    float key[kPer];
    Load<T, kPer>(At<T>(p, row, head / p.group, j, false), p.dim, p.whole_vectors, key);
    const float score = Cap(Dot<kPer>(query, key), p.softcap);
    const float log_p = score - log_total, probability = expf(log_p);
    const int back = row.position - j;
    if (score > sums.top_score) sums.top_score = score, sums.top_key = j;
    sums.mass += probability;
    sums.entropy -= probability * log_p;
    if (j < kSinkTokens) {
      sums.sink += probability;
    } else {
      sums.distance += probability * static_cast<float>(back);
      if (request.far_window > 0 && back >= request.far_window) sums.far += probability;
    }
    if (p.window > 0 && back >= p.window) sums.beyond += probability;
    if (min(32 - __clz(back), kDistanceBuckets - 1) == lane) sums.bucket += probability;
    for (int r = probes_begin; r < probes_end; ++r) {
      if (j >= request.probes[r].begin && j < request.probes[r].end) {
        sums.probe += probability;
        break;
      }
    }
  }

  __shared__ Sums all[kSpanWarps];
  __shared__ float buckets[kSpanWarps][kWarp];
  buckets[warp][lane] = sums.bucket;
  if (lane == 0) all[warp] = sums;
  __syncthreads();
  SpanRecord& record = request.records[int64_t{blockIdx.x} * p.heads + head];
  // 1, but for what log_total misses where scores were of rounded queries.
  float total = p.sinks != nullptr ? expf(p.sinks[head] - log_total) : 0;
  for (const Sums& o : all) total += o.mass;
  if (threadIdx.x < kDistanceBuckets) {
    float sum = 0;
    for (int w = 0; w < kSpanWarps; ++w) sum += buckets[w][threadIdx.x];
    record.mass_by_distance[threadIdx.x] = sum / total;
  }
  if (threadIdx.x != 0) return;
  Sums s = all[0];
  for (int w = 1; w < kSpanWarps; ++w) {
    const Sums& o = all[w];
    s.mass += o.mass;
    s.far += o.far;
    s.sink += o.sink;
    s.distance += o.distance;
    s.entropy += o.entropy;
    s.probe += o.probe;
    s.beyond += o.beyond;
    if (o.top_score > s.top_score || (o.top_score == s.top_score && o.top_key < s.top_key)) {
      s.top_score = o.top_score;
      s.top_key = o.top_key;
    }
  }
  const float others = s.mass - s.sink;
  record.far_mass = s.far / total;
  record.sink_mass = s.sink / total;
  record.distance = s.distance > 0 ? s.distance / others : 0;
  const float entropy = (s.entropy + s.mass * logf(total)) / total;
  record.entropy =
      row.position > 0 ? fmaxf(0, entropy) / logf(static_cast<float>(row.position + 1)) : 0;
  record.top_probability = expf(s.top_score - log_total) / total;
  record.top_key = s.top_key;
  record.probe_mass = s.probe / total;
  record.beyond_window = s.beyond / total;
}

template <class T, int kPer>
void Launch(BackendContext& context, const Piece& p, int rows, int kv_heads) {
  const auto Run = [&](auto kernel, int heads) {
    const int groups = (p.group + heads - 1) / heads;
    kernel<<<dim3(rows, kv_heads * groups, MostSplits(p)), kWarps * kWarp, 0, context.stream>>>(p);
  };
  if (SplitsInVectors(p)) {
    AttendSplits(context, p, rows, kv_heads);
  } else if (p.group == 1) {
    Run(Partial<T, kPer, 1>, 1);
  } else if (p.group <= 2) {
    Run(Partial<T, kPer, 2>, 2);
  } else {
    Run(Partial<T, kPer, 4>, 4);
  }
  Merge<<<dim3(rows, p.heads), std::min((p.dim + 31) / 32 * 32, 256), 0, context.stream>>>(p);
}

template <class T, int kPer>
void Run(BackendContext& context, const AttentionArgs& a, const Problem& problem) {
  // The workspace holds log_total for all rows, then partial results of as many rows as fit.
  Piece p = {problem};
  const size_t total_bytes = (sizeof(float) * a.batch.rows * p.heads + 255) / 256 * 256;
  const size_t row_bytes = sizeof(float) * p.heads * kMaxSplits * (p.dim + 2);
  CHECK_LE(total_bytes + row_bytes, BackendContext::kWorkspaceBytes);
  const int most = static_cast<int>(
      std::min<size_t>(a.batch.rows, (BackendContext::kWorkspaceBytes - total_bytes) / row_bytes));
  auto* memory = static_cast<std::byte*>(context.Workspace(total_bytes + most * row_bytes));
  p.log_total = reinterpret_cast<float*>(memory);
  p.partial = reinterpret_cast<float*>(memory + total_bytes);

  const int32_t* begin = a.batch.HostRowBegin();
  const bool tiles = AttendsInTiles(p);
  const auto Tiled = [&](int s) { return tiles && begin[s + 1] - begin[s] >= kTileRows; };
  bool any_tiled = false;
  for (int s = 0; s < a.batch.sequences;) {
    if (Tiled(s)) {
      any_tiled = true;
      ++s;
      continue;
    }
    p.first_row = begin[s];
    while (s < a.batch.sequences && !Tiled(s)) ++s;
    for (const int end = begin[s]; p.first_row < end; p.first_row += most) {
      Launch<T, kPer>(context, p, std::min(most, end - p.first_row), a.cache.kv_heads);
    }
  }
  if (any_tiled) (AttendsInWgmma(context, p) ? AttendWgmma : AttendTiles)(context, p);
  if (a.spans.count == 0) return;
  Observe<T, kPer><<<dim3(a.spans.count, p.heads), kSpanWarps * kWarp, 0, context.stream>>>(p);
}

template <class T>
void RunFor(BackendContext& context, const AttentionArgs& a, const Problem& p) {
  if (p.dim <= 64) {
    Run<T, 2>(context, a, p);
  } else if (p.dim <= 128) {
    Run<T, 4>(context, a, p);
  } else {
    Run<T, 8>(context, a, p);
  }
}

}  // namespace

void Attention(BackendContext& context, const AttentionArgs& a) {
  if (a.batch.rows == 0) return;
  Problem p = {};
  p.query = a.query.as<const float>();
  p.key = a.key.data;
  p.value = a.value.data;
  p.out = a.out.data;
  p.query_row = a.query.stride[0];
  p.query_head = a.query.stride[1];
  p.key_row = a.key.stride[0];
  p.key_head = a.key.stride[1];
  p.value_row = a.value.stride[0];
  p.value_head = a.value.stride[1];
  p.out_row = a.out.stride[0];
  p.out_head = a.out.stride[1];
  p.sinks = a.sinks.empty() ? nullptr : a.sinks.as<const float>();
  p.cache = a.cache;
  p.batch = a.batch;
  p.spans = a.spans;
  p.scale = a.scale;
  p.softcap = a.softcap;
  p.window = a.window;
  p.heads = static_cast<int>(a.query.shape[1]);
  p.dim = static_cast<int>(a.query.shape[2]);
  p.group = p.heads / a.cache.kv_heads;
  p.half_out = a.out.dtype == DType::kBF16;
  CHECK_LE(p.dim, 256);
  CHECK_EQ(p.heads % a.cache.kv_heads, 0);
  CHECK(p.half_out || a.out.dtype == DType::kF32) << Info(a.out.dtype).name;
  CHECK(a.key.dtype == a.cache.dtype && a.value.dtype == a.cache.dtype);
  // Every row of keys begins at a multiple of the widest vector (8 elements) if these do.
  p.whole_vectors = true;
  for (int64_t n : {int64_t{p.dim}, p.key_row, p.key_head, p.value_row, p.value_head,
                    a.cache.key_offset / 2, a.cache.value_offset / 2}) {
    p.whole_vectors = p.whole_vectors && n % 8 == 0;
  }
  switch (a.cache.dtype) {
    case DType::kF32:
      RunFor<float>(context, a, p);
      break;
    case DType::kBF16:
      RunFor<__nv_bfloat16>(context, a, p);
      break;
    default:
      CHECK(false) << Info(a.cache.dtype).name << " is not a cache type";
  }
  CheckLaunch(context, "Attention");
}

}  // namespace longspan::cuda
