#include "kernels/cpu/span_state.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace longspan::cpu {

void SpanState::RaiseTo(double higher) {
  if (higher <= max) return;
  const double a = std::exp(max - higher);
  h = l == 0 ? 0 : a * (h + (max - higher) * l);
  for (double* sum : {&l, &distance, &far, &sink, &probe, &beyond}) *sum *= a;
  for (double& bucket : buckets) bucket *= a;
  max = higher;
}

void SpanState::Add(const Edges& edges, int64_t first, const float* scores, int count) {
  for (int k = 0; k < count; ++k) {
    if (scores[k] == -INFINITY) continue;
    if (top_key < 0 || scores[k] > top_score) {
      top_score = scores[k];
      top_key = static_cast<int32_t>(first + k);
    }
  }
  if (top_key < 0) return;
  RaiseTo(top_score);
  for (int k = 0; k < count; ++k) {
    if (scores[k] == -INFINITY) continue;
    const int64_t key = first + k;
    const int64_t back = edges.position - key;
    const double e = std::exp(static_cast<double>(scores[k]) - max);
    l += e;
    h += e * (scores[k] - max);
    if (key < kSinkTokens) {
      sink += e;
    } else {
      distance += e * static_cast<double>(back);
      if (edges.far_window > 0 && back >= edges.far_window) far += e;
    }
    if (edges.own_window > 0 && back >= edges.own_window) beyond += e;
    const int bucket = std::bit_width(static_cast<uint64_t>(back));
    buckets[std::min(bucket, kDistanceBuckets - 1)] += e;
    for (int r = 0; r < edges.probe_count; ++r) {
      if (key >= edges.probes[r].begin && key < edges.probes[r].end) {
        probe += e;
        break;
      }
    }
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
