// What observed rows attend to, from the scores that attending them left behind: keys are not
// read again. Bytes: 4 per head and visible key.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/late_spans.h"
#include "kernels/cuda/launch.cuh"

namespace longspan::cuda {
namespace {

constexpr int kMostWarps = 16;
constexpr int kStrides = 4;  // scores of a lane at a time; the next are loaded meanwhile
constexpr int kWarpKeys = kStrides * kWarp;
constexpr int kNearBuckets = 6;     // that hold the first kWarp distances
constexpr float kNoScore = -1e30f;  // of no probability; finite, so that no product of it is a NaN
constexpr unsigned kAllLanes = 0xffffffffu;

// Sums over keys of one head of one observed row, each key's probability known.
struct Sums {
  float far = 0, sink = 0, distance = 0, entropy = 0, probe = 0;
  float top_score = -INFINITY;
  int top_back = 0;  // its distance: the greatest on a tie

  // Every lane's, in all lanes.
  __device__ void AddLanes() {
    far = WarpSum(far);
    sink = WarpSum(sink);
    distance = WarpSum(distance);
    entropy = WarpSum(entropy);
    probe = WarpSum(probe);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float score = __shfl_xor_sync(kAllLanes, top_score, offset);
      const int back = __shfl_xor_sync(kAllLanes, top_back, offset);
      if (score > top_score || (score == top_score && back > top_back)) {
        top_score = score;
        top_back = back;
      }
    }
  }
};

__device__ __forceinline__ int Bucket(int distance) {
  return min(32 - __clz(distance), kDistanceBuckets - 1);
}

// Rows that are observed at once: of one piece, or of the pieces of a graph.
template <int kMost>
struct Pieces {
  Piece at[kMost];
  int observed[kMost];  // rows
};

// grid: observed rows, heads, pieces. It may run beside Merge: it begins when partial results are
// there and ends when all is. Warps take kWarpKeys distances at a time, in turn: beyond the first
// kWarp each kWarp of these lie in one bucket, and a warp's come in ascending order.
template <int kMost>
__global__ void __launch_bounds__(kMostWarps* kWarp)
    Observe(const __grid_constant__ Pieces<kMost> pieces) {
  LetNextBegin();
  const Piece& p = pieces.at[blockIdx.z];
  if (static_cast<int>(blockIdx.x) >= pieces.observed[blockIdx.z] ||
      static_cast<int>(blockIdx.y) >= p.heads) {
    return;
  }
  const bool beside_merge = !p.late && p.parts != Parts::kWhole;
  if (!beside_merge) AwaitEarlier();
  const SpanRequest& request = p.spans;
  const int observed = p.first_observed + blockIdx.x, head = blockIdx.y;
  const int local = request.rows[observed] - p.first_row;
  const Row row(p, p.first_row + local);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float* scores = Scores(p, local, head);
  const int probes_begin = request.probe_offsets != nullptr ? request.probe_offsets[observed] : 0;
  const int probes_end = request.probe_offsets != nullptr ? request.probe_offsets[observed + 1] : 0;
  const int furthest = row.position - row.first;
  const int far = request.far_window > 0 ? request.far_window : row.position + 1;

  __shared__ float buckets[kDistanceBuckets][kMostWarps];
  __shared__ Sums all[kMostWarps];
  for (int b = lane; b < kDistanceBuckets; b += kWarp) buckets[b][warp] = 0;
  __syncwarp();

  float next[kStrides];
  const auto Fetch = [&](int nearest) {
#pragma unroll
    for (int i = 0; i < kStrides; ++i) {
      const int back = nearest + i * kWarp + lane;
      next[i] = back <= furthest ? __ldg(scores + furthest - back) : kNoScore;
    }
  };
  Fetch(warp * kWarpKeys);
  const Softmax softmax = SoftmaxOf(p, PartialsOf(p, local, head), head);
  const float log_total = kLog2E * softmax.highest + log2f(softmax.total);
  Sums sums;
  float in_bucket = 0;
  int bucket = 0;
  for (int nearest = warp * kWarpKeys; nearest <= furthest; nearest += warps * kWarpKeys) {
    float score[kStrides];
#pragma unroll
    for (int i = 0; i < kStrides; ++i) score[i] = next[i];
    Fetch(nearest + warps * kWarpKeys);
#pragma unroll
    for (int i = 0; i < kStrides; ++i) {
      const int begin = nearest + i * kWarp, back = begin + lane;
      const float log_p = fmaf(kLog2E, score[i], -log_total);
      const float probability = exp2f(log_p);
      sums.entropy = fmaf(-probability, log_p, sums.entropy);
      if (score[i] >= sums.top_score) sums.top_score = score[i], sums.top_back = back;
      const int j = row.position - back;
      if (j >= kSinkTokens) {
        sums.distance = fmaf(probability, static_cast<float>(back), sums.distance);
        if (back >= far) sums.far += probability;
      } else {
        sums.sink += probability;
      }
      for (int r = probes_begin; r < probes_end; ++r) {
        if (j >= request.probes[r].begin && j < request.probes[r].end) {
          sums.probe += probability;
          break;
        }
      }
      if (begin == 0) {
#pragma unroll
        for (int b = 0; b < kNearBuckets; ++b) {
          const float sum = WarpSum(Bucket(back) == b ? probability : 0);
          if (lane == 0) buckets[b][warp] = sum;
        }
        continue;
      }
      if (const int now = Bucket(begin); now != bucket) {
        const float sum = WarpSum(in_bucket);
        if (lane == 0) buckets[bucket][warp] += sum;
        in_bucket = 0;
        bucket = now;
      }
      in_bucket += probability;
    }
  }
  const float sum = WarpSum(in_bucket);
  if (lane == 0) buckets[bucket][warp] += sum;
  sums.AddLanes();
  if (lane == 0) all[warp] = sums;
  __syncthreads();

  if (warp == 0) {
    Sums s;
    if (lane < warps) s = all[lane];
    s.AddLanes();
    float in_mine = 0;
    for (int w = 0; w < warps && lane < kDistanceBuckets; ++w) in_mine += buckets[lane][w];
    const float others = WarpSum(in_mine) - s.sink;
    SpanRecord& record = request.records[int64_t{observed} * p.heads + head];
    if (lane < kDistanceBuckets) record.mass_by_distance[lane] = in_mine;
    if (lane == 0) {
      record.far_mass = s.far;
      record.sink_mass = s.sink;
      record.distance = s.distance > 0 ? s.distance / others : 0;
      record.entropy =
          row.position > 0 ? fmaxf(0, s.entropy) / log2f(static_cast<float>(row.position + 1)) : 0;
      record.top_probability = exp2f(fmaf(kLog2E, s.top_score, -log_total));
      record.top_key = row.position - s.top_back;
      record.probe_mass = s.probe;
      record.beyond_window = 0;  // no keys there were attended
    }
  }
  if (beside_merge) AwaitEarlier();
}

// As many blocks as rows, heads and pieces at most have, of so many warps that all are under way
// at once, or of few: what a warp does besides its keys is worth a hundred of them.
template <int kMost>
void Launch(BackendContext& context, const Pieces<kMost>& pieces, int count) {
  constexpr int kFewWarps = 4, kWarpsAtOnce = 32;  // of a block; of a multiprocessor
  int rows = 0, heads = 0;
  int64_t keys = 0;
  for (int i = 0; i < count; ++i) {
    rows = std::max(rows, pieces.observed[i]);
    heads = std::max(heads, pieces.at[i].heads);
    keys = std::max(keys, MostKeys(pieces.at[i]));
  }
  const int64_t blocks = int64_t{rows} * heads * count;
  const auto at_once =
      std::clamp<int64_t>(kWarpsAtOnce * context.sm_count / blocks, kFewWarps, kMostWarps);
  const int64_t warps = std::min((keys + kWarpKeys - 1) / kWarpKeys, at_once);
  LaunchEarly(context, Observe<kMost>, dim3(rows, heads, count), static_cast<int>(warps) * kWarp,
              pieces);
}

}  // namespace

struct LateSpans {
  static constexpr size_t kBytes = size_t{256} << 20;  // from the first rows on that are observed
  static constexpr int kPieces = 64;                   // of a kernel

  std::byte* memory = nullptr;
  size_t used = 0;
  bool tried = false, capturing = false;  // tried: to get memory
  Pieces<kPieces> pieces;
  int count = 0;
};
static_assert(sizeof(Pieces<LateSpans::kPieces>) <= 32764, "a kernel takes no more");

LateSpans* MakeLateSpans() { return new LateSpans; }
void FreeLateSpans(LateSpans* spans) {
  cudaFree(spans->memory);
  delete spans;
}

void BeginLateSpans(BackendContext& context) {
  LateSpans& late = *context.late_spans;
  late.capturing = true;
  late.used = 0;
}
void EndLateSpans(BackendContext& context) {
  LateSpans& late = *context.late_spans;
  if (late.count > 0) Launch(context, late.pieces, late.count);
  late.count = 0;
  late.capturing = false;
}

void* TakeLate(BackendContext& context, size_t bytes) {
  LateSpans& late = *context.late_spans;
  if (!late.capturing) {
    if (!std::exchange(late.tried, true) &&
        cudaMalloc(&late.memory, LateSpans::kBytes) != cudaSuccess) {
      cudaGetLastError();  // out of memory is an answer, not a fault
      late.memory = nullptr;
    }
    return nullptr;
  }
  bytes = (bytes + 255) / 256 * 256;
  if (late.memory == nullptr || bytes > LateSpans::kBytes - late.used) return nullptr;
  late.used += bytes;
  return late.memory + (late.used - bytes);
}

void ObserveSpans(BackendContext& context, const Piece& p, int observed) {
  if (!p.late) return Launch<1>(context, {{p}, {observed}}, 1);
  LateSpans& late = *context.late_spans;
  if (late.count == LateSpans::kPieces) {
    Launch(context, late.pieces, late.count);
    late.count = 0;
  }
  late.pieces.at[late.count] = p;
  late.pieces.observed[late.count++] = observed;
}

}  // namespace longspan::cuda
