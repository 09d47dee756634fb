#include "engine/attention_spans.h"

#include <algorithm>

#include "absl/time/clock.h"
#include "kernels/check.h"

namespace longspan {

SpanSums EmptySums(const ModelSpec& spec) {
  SpanSums sums;
  sums.layers = static_cast<int>(spec.layers.size());
  for (const LayerSpec& layer : spec.layers) {
    if (const auto* a = std::get_if<AttentionSpec>(&layer.mixer)) {
      sums.heads = std::max(sums.heads, a->heads);
    }
  }
  sums.sums.resize(static_cast<size_t>(sums.layers) * sums.heads);
  return sums;
}

void AddRow(const ModelSpec& spec, const SpanRow& row, int64_t position,
            absl::Span<const int32_t> tokens, int32_t next, SpanSums& sums) {
  const int far_window = spec.window();
  for (int l = 0; l < sums.layers; ++l) {
    const auto* attention = std::get_if<AttentionSpec>(&spec.layers[l].mixer);
    if (attention == nullptr) continue;
    const SpanRecord* records = row.Layer(l, attention->heads);
    for (int h = 0; h < attention->heads; ++h) {
      const SpanRecord& r = records[h];
      HeadSums& s = sums.at(l, h);
      if (attention->window.has_value()) CHECK_EQ(r.beyond_window, 0.0f) << "layer " << l;
      s.queries += 1;
      s.far_mass += r.far_mass;
      if (position >= kSinkTokens + far_window) {
        s.sink_mass += r.sink_mass;
        s.sink_queries += 1;
      }
      s.distance += r.distance;
      s.entropy += r.entropy;
      s.top_probability += r.top_probability;
      s.probe_mass += r.probe_mass;
      s.beyond_window += r.beyond_window;
      const bool far = far_window > 0 && position - r.top_key >= far_window;
      if (far && tokens[r.top_key] == next) s.copy_hits += 1;
      for (int b = 0; b < kDistanceBuckets; ++b) s.mass_by_distance[b] += r.mass_by_distance[b];
    }
  }
}

AttentionSpans::AttentionSpans(const ModelSpec& spec) : spec_(spec) {
  absl::MutexLock lock(&mu_);
  Clear();
}

void AttentionSpans::Clear() {
  const uint64_t sequence = totals_.sequence;
  totals_ = SpanSnapshot();
  totals_.sequence = sequence;
  totals_.sums = EmptySums(spec_);
  totals_.recent_distance.resize(totals_.sums.sums.size());
}

void AttentionSpans::Add(const SpanRow& row, int64_t position, absl::Span<const int32_t> tokens,
                         int32_t next) {
  absl::MutexLock lock(&mu_);
  SpanSums& sums = totals_.sums;
  AddRow(spec_, row, position, tokens, next, sums);
  const double weight = totals_.observed_queries == 0 ? 1 : kRecentWeight;
  for (int l = 0; l < sums.layers; ++l) {
    const auto* attention = std::get_if<AttentionSpec>(&spec_.layers[l].mixer);
    if (attention == nullptr) continue;
    const SpanRecord* records = row.Layer(l, attention->heads);
    double* recent = totals_.recent_distance.data() + static_cast<size_t>(l) * sums.heads;
    for (int h = 0; h < attention->heads; ++h)
      recent[h] += weight * (records[h].distance - recent[h]);
  }
  ++totals_.observed_queries;
}

void AttentionSpans::CountStep(bool observed) {
  absl::MutexLock lock(&mu_);
  if (observed) {
    ++totals_.sampled_steps;
    ++totals_.sequence;
  } else {
    ++totals_.dropped_steps;
  }
}

void AttentionSpans::CountRequest() {
  absl::MutexLock lock(&mu_);
  ++totals_.observed_requests;
}

SpanSnapshot AttentionSpans::Snapshot() const {
  SpanSnapshot snapshot;
  {
    absl::MutexLock lock(&mu_);
    snapshot = totals_;
  }
  snapshot.observed_at = absl::Now();
  return snapshot;
}

void AttentionSpans::Reset() {
  absl::MutexLock lock(&mu_);
  Clear();
}

}  // namespace longspan
