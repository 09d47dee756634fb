#include "kernels/cpu/span_state.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/cpu/lanes.h"

namespace longspan::cpu {
namespace {

static_assert(kBlockKeys % kLanes == 0);

// A block's highest score and, unless that is -inf, its weights e^(s - max) and the sums of them,
// of them times s - max, and of them times the distance, sinks excluded. A block's sums are floats,
// those of blocks doubles.
struct Weighed {
  float highest;
  float weights[kBlockKeys];
  double total, h, distance;
};

LONGSPAN_INLINE double Sum(const Lanes& lanes) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

// `previous`: the maximum before the block; `furthest`: its first key's distance; `sinks`: keys of
// it that are.
LONGSPAN_INLINE void Weigh(const float* scores, float previous, float furthest, int sinks,
                           Weighed& block) {
  const Lanes zero = {};
  const auto score = [scores](int k) -> const Lanes& {
    return *reinterpret_cast<const Lanes*>(scores + k);
  };
  Lanes highest = zero - INFINITY;
  for (int k = 0; k < kBlockKeys; k += kLanes) {
    highest = score(k) > highest ? score(k) : highest;
  }
  block.highest = highest[0];
  for (int i = 1; i < kLanes; ++i) block.highest = std::max(block.highest, highest[i]);
  if (block.highest == -INFINITY) return;

  const float max = std::max(previous, block.highest);
  Lanes back = furthest - Lanes{0, 1, 2, 3, 4, 5, 6, 7};
  Lanes total = zero, h = zero, distance = zero;
  for (int k = 0; k < kBlockKeys; k += kLanes, back -= static_cast<float>(kLanes)) {
    const Lanes log = score(k) - max;
    Lanes e;
    Exp(log, e);
    std::memcpy(block.weights + k, &e, sizeof(e));
    total += e;
    h += e > zero ? e * log : zero;  // a masked key's log is infinite
    distance += back > furthest - static_cast<float>(sinks) ? zero : e * back;
  }
  block.total = Sum(total);
  block.h = Sum(h);
  block.distance = Sum(distance);
}
LONGSPAN_LANES void WeighLanes(const float* scores, float previous, float furthest, int sinks,
                               Weighed& block) {
  Weigh(scores, previous, furthest, sinks, block);
}
void WeighPortable(const float* scores, float previous, float furthest, int sinks, Weighed& block) {
  Weigh(scores, previous, furthest, sinks, block);
}

double SumOf(const float* weights, int64_t begin, int64_t end) {
  double sums[4] = {};
  int64_t k = begin;
  for (; k + 4 <= end; k += 4) {
    for (int i = 0; i < 4; ++i) sums[i] += static_cast<double>(weights[k + i]);
  }
  for (; k < end; ++k) sums[0] += static_cast<double>(weights[k]);
  return sums[0] + sums[1] + (sums[2] + sums[3]);
}

int Bucket(int64_t distance) {
  return std::min(static_cast<int>(std::bit_width(static_cast<uint64_t>(distance))),
                  kDistanceBuckets - 1);
}

}  // namespace

void SpanState::RaiseTo(double higher) {
  if (higher <= max) return;
  if (l > 0) {
    const double a = std::exp(max - higher);
    h = a * (h + (max - higher) * l);
    for (double* sum : {&l, &distance, &far, &sink, &probe, &beyond}) *sum *= a;
    for (double& bucket : buckets) bucket *= a;
  }
  max = higher;
}

void SpanState::Add(const Edges& edges, int64_t first, const float* scores, Simd simd) {
  Weighed block;
  const int64_t furthest = edges.position - first;
  const auto sinks = static_cast<int>(std::max<int64_t>(0, kSinkTokens - first));
  (simd == Simd::kPortable ? WeighPortable : WeighLanes)(
      scores, static_cast<float>(max), static_cast<float>(furthest), sinks, block);
  if (block.highest == -INFINITY) return;
  if (top_key < 0 || block.highest > top_score) {
    top_score = block.highest;
    const float* top = std::find(scores, scores + kBlockKeys, top_score);
    top_key = static_cast<int32_t>(first + (top - scores));
  }
  RaiseTo(top_score);
  l += block.total;
  h += block.h;
  distance += block.distance;

  // Of keys [begin, end), which may lie outside of the block.
  const auto sum = [&](int64_t begin, int64_t end) {
    const int64_t from = std::max<int64_t>(begin - first, 0);
    const int64_t to = std::min<int64_t>(end - first, kBlockKeys);
    return from == 0 && to == kBlockKeys ? block.total : SumOf(block.weights, from, to);
  };
  sink += sum(0, kSinkTokens);
  if (edges.far_window > 0) far += sum(kSinkTokens, edges.position - edges.far_window + 1);
  if (edges.own_window > 0) beyond += sum(0, edges.position - edges.own_window + 1);
  const int64_t nearest = std::max<int64_t>(0, furthest - (kBlockKeys - 1));
  for (int b = Bucket(nearest); b <= Bucket(furthest); ++b) {
    const int64_t begin = b + 1 < kDistanceBuckets ? edges.position - (int64_t{1} << b) + 1 : 0;
    const int64_t end = edges.position + 1 - (b == 0 ? 0 : int64_t{1} << (b - 1));
    buckets[b] += sum(begin, end);
  }
  AddProbes(edges, first, block.weights);
}

void SpanState::AddProbes(const Edges& edges, int64_t first, const float* weights) {
  const auto* const end = edges.probes + edges.probe_count;
  const bool any = std::any_of(edges.probes, end, [&](const ProbeRange& r) {
    return r.begin < first + kBlockKeys && r.end > first;
  });
  for (int k = 0; any && k < kBlockKeys; ++k) {
    const bool in_one = std::any_of(edges.probes, end, [&](const ProbeRange& r) {
      return first + k >= r.begin && first + k < r.end;
    });
    if (in_one) probe += static_cast<double>(weights[k]);
  }
}

void SpanState::Merge(const SpanState& later) {
  if (later.top_key < 0) return;
  SpanState other = later;
  if (top_key < 0 || other.top_score > top_score) {
    top_score = other.top_score;
    top_key = other.top_key;
  }
  const double common = std::max(max, other.max);
  RaiseTo(common);
  other.RaiseTo(common);
  l += other.l;
  h += other.h;
  distance += other.distance;
  far += other.far;
  sink += other.sink;
  probe += other.probe;
  beyond += other.beyond;
  for (int b = 0; b < kDistanceBuckets; ++b) buckets[b] += other.buckets[b];
}

SpanRecord SpanState::Record(int64_t position, double sink_logit) const {
  // The learned sink may exceed every logit; e^(sink - max) may then overflow, so scale to the
  // larger.
  const double common = std::max(max, sink_logit);
  const double a = std::exp(max - common);
  const double total = a * l + std::exp(sink_logit - common);
  const double inverse = a / total;
  SpanRecord r;
  r.far_mass = static_cast<float>(far * inverse);
  r.sink_mass = static_cast<float>(sink * inverse);
  const double without_sinks = l - sink;
  r.distance = static_cast<float>(without_sinks > 0 ? distance / without_sinks : 0);
  if (position > 0) {
    // -sum p ln p with ln p = (s - max) + ln(inverse).
    const double entropy = -inverse * (h + l * std::log(inverse));
    r.entropy =
        static_cast<float>(std::max(0.0, entropy) / std::log(static_cast<double>(position + 1)));
  }
  r.top_probability = static_cast<float>(std::exp(top_score - max) * inverse);
  r.top_key = std::max(top_key, 0);
  r.probe_mass = static_cast<float>(probe * inverse);
  r.beyond_window = static_cast<float>(beyond * inverse);
  for (int b = 0; b < kDistanceBuckets; ++b)
    r.mass_by_distance[b] = static_cast<float>(buckets[b] * inverse);
  return r;
}

}  // namespace longspan::cpu
