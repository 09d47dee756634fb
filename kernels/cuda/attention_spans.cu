// What observed rows attend to, from their scores, which the rows' splits left behind: keys are not
// read again. Bytes: 4 per head and visible key.
#include "kernels/cuda/attention.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 8;

// Sums over keys of one head of one observed row, each key's probability known.
struct Sums {
  float mass = 0, far = 0, sink = 0, distance = 0, entropy = 0, probe = 0, beyond = 0;
  float top_score = -INFINITY;
  int top_key = 0;

  __device__ void Add(const Sums& o) {
    mass += o.mass;
    far += o.far;
    sink += o.sink;
    distance += o.distance;
    entropy += o.entropy;
    probe += o.probe;
    beyond += o.beyond;
    if (o.top_score > top_score || (o.top_score == top_score && o.top_key < top_key)) {
      top_score = o.top_score;
      top_key = o.top_key;
    }
  }
  __device__ Sums From(int lane_mask) const {
    Sums o;
    const auto Take = [&](auto x) { return __shfl_xor_sync(0xffffffffu, x, lane_mask); };
    o.mass = Take(mass);
    o.far = Take(far);
    o.sink = Take(sink);
    o.distance = Take(distance);
    o.entropy = Take(entropy);
    o.probe = Take(probe);
    o.beyond = Take(beyond);
    o.top_score = Take(top_score);
    o.top_key = Take(top_key);
    return o;
  }
};

__device__ __forceinline__ int Bucket(int distance) { return 32 - __clz(distance); }

// grid: observed rows, heads. Warps take 32 distances at a time, in turn: beyond the first 32 these
// lie in one bucket, and a warp's come in ascending order.
__global__ void __launch_bounds__(kWarps* kWarp) Observe(const Piece p) {
  const SpanRequest& request = p.spans;
  const int observed = p.first_observed + blockIdx.x, head = blockIdx.y;
  const Row row(p, request.rows[observed]);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t local = int64_t{request.rows[observed] - p.first_row} * p.heads + head;
  const float* scores = p.scores + local * p.score_stride;
  const float log_total = p.log_total[local];
  const int probes_begin = request.probe_offsets != nullptr ? request.probe_offsets[observed] : 0;
  const int probes_end = request.probe_offsets != nullptr ? request.probe_offsets[observed + 1] : 0;
  const int furthest = row.position - row.first;

  __shared__ float buckets[kDistanceBuckets][kWarps];
  __shared__ Sums all[kWarps];
  for (int i = threadIdx.x; i < kDistanceBuckets * kWarps; i += kWarps * kWarp) {
    buckets[i / kWarps][i % kWarps] = 0;
  }
  __syncthreads();

  Sums sums;
  float in_bucket = 0;
  int bucket = 0;
  const auto ScoreAt = [&](int back) {
    return back <= furthest ? __ldg(scores + furthest - back) : -INFINITY;
  };
  float next = ScoreAt(warp * kWarp + lane);
  for (int nearest = warp * kWarp; nearest <= furthest; nearest += kWarps * kWarp) {
    const int back = nearest + lane, j = row.position - back;
    const float score = next;
    next = ScoreAt(back + kWarps * kWarp);
    float probability = 0;
    if (back <= furthest) {
      const float log_p = score - log_total;
      probability = expf(log_p);
      sums.mass += probability;
      sums.entropy -= probability * log_p;
      if (score >= sums.top_score) sums.top_score = score, sums.top_key = j;
      if (j < kSinkTokens) {
        sums.sink += probability;
      } else {
        sums.distance += probability * static_cast<float>(back);
        if (request.far_window > 0 && back >= request.far_window) sums.far += probability;
      }
      if (p.window > 0 && back >= p.window) sums.beyond += probability;
      for (int r = probes_begin; r < probes_end; ++r) {
        if (j >= request.probes[r].begin && j < request.probes[r].end) {
          sums.probe += probability;
          break;
        }
      }
    }
    if (nearest == 0) {
      for (int b = 0; b <= Bucket(kWarp - 1); ++b) {
        const float sum = WarpSum(Bucket(back) == b ? probability : 0);
        if (lane == 0) buckets[b][warp] = sum;
      }
      continue;
    }
    if (const int now = min(Bucket(nearest), kDistanceBuckets - 1); now != bucket) {
      const float sum = WarpSum(in_bucket);
      if (lane == 0) buckets[bucket][warp] += sum;
      in_bucket = 0;
      bucket = now;
    }
    in_bucket += probability;
  }
  const float sum = WarpSum(in_bucket);
  if (lane == 0) buckets[bucket][warp] += sum;

#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) sums.Add(sums.From(mask));
  if (lane == 0) all[warp] = sums;
  __syncthreads();
  SpanRecord& record = request.records[int64_t{observed} * p.heads + head];
  if (threadIdx.x < kDistanceBuckets) {
    float of_all = 0;
    for (int w = 0; w < kWarps; ++w) of_all += buckets[threadIdx.x][w];
    record.mass_by_distance[threadIdx.x] = of_all;
  }
  if (threadIdx.x != 0) return;
  Sums s = all[0];
  for (int w = 1; w < kWarps; ++w) s.Add(all[w]);
  const float others = s.mass - s.sink;
  record.far_mass = s.far;
  record.sink_mass = s.sink;
  record.distance = s.distance > 0 ? s.distance / others : 0;
  record.entropy =
      row.position > 0 ? fmaxf(0, s.entropy) / logf(static_cast<float>(row.position + 1)) : 0;
  record.top_probability = expf(s.top_score - log_total);
  record.top_key = s.top_key;
  record.probe_mass = s.probe;
  record.beyond_window = s.beyond;
}

}  // namespace

void ObserveSpans(BackendContext& context, const Piece& p, int observed) {
  Observe<<<dim3(observed, p.heads), kWarps * kWarp, 0, context.stream>>>(p);
}

}  // namespace longspan::cuda
