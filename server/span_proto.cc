#include "server/span_proto.h"

#include <algorithm>
#include <cmath>

#include "google/protobuf/timestamp.pb.h"

namespace longspan {

v1::LayerKind KindOf(const LayerSpec& layer) {
  const auto* attention = std::get_if<AttentionSpec>(&layer.mixer);
  if (attention == nullptr) return v1::LAYER_KIND_LINEAR;
  if (!attention->window.has_value()) return v1::LAYER_KIND_FULL;
  return attention->chunked ? v1::LAYER_KIND_CHUNKED : v1::LAYER_KIND_SLIDING;
}

const char* KindName(const LayerSpec& layer) {
  switch (KindOf(layer)) {
    case v1::LAYER_KIND_FULL:
      return "full";
    case v1::LAYER_KIND_SLIDING:
      return "sliding";
    case v1::LAYER_KIND_CHUNKED:
      return "chunked";
    default:
      return "linear";
  }
}

int WindowOf(const LayerSpec& layer) {
  const auto* attention = std::get_if<AttentionSpec>(&layer.mixer);
  return attention != nullptr ? attention->window.value_or(0) : 0;
}

double Percentile(const double (&mass_by_distance)[kDistanceBuckets], double share) {
  double total = 0;
  for (double mass : mass_by_distance) total += mass;
  if (total <= 0) return 0;
  double below = 0;
  for (int b = 0; b < kDistanceBuckets; ++b) {
    const double mass = mass_by_distance[b];
    if (mass > 0 && below + mass >= share * total) {
      if (b == 0) return 0;
      const double low = std::ldexp(1.0, b - 1);
      return low + low * (share * total - below) / mass;
    }
    below += mass;
  }
  return std::ldexp(1.0, kDistanceBuckets - 1);
}

v1::SpanSnapshot ToProto(const SpanSums& sums, const ModelSpec& spec,
                         const std::vector<uint32_t>& only) {
  v1::SpanSnapshot to;
  to.set_num_heads(sums.heads);
  for (int l = 0; l < sums.layers; ++l) {
    if (!only.empty() && std::find(only.begin(), only.end(), l) == only.end()) continue;
    const LayerSpec& layer = spec.layers[l];
    const auto* attention = std::get_if<AttentionSpec>(&layer.mixer);
    v1::LayerSpans* out = to.add_layers();
    out->set_layer(l);
    out->set_kind(KindOf(layer));
    out->set_window_tokens(WindowOf(layer));
    if (attention == nullptr) continue;
    double by_distance[kDistanceBuckets] = {};
    for (int h = 0; h < attention->heads; ++h) {
      const HeadSums& s = sums.at(l, h);
      const double n = std::max(s.queries, 1.0);
      out->add_mean_tokens(static_cast<float>(s.distance / n));
      out->add_p50_tokens(static_cast<float>(Percentile(s.mass_by_distance, 0.50)));
      out->add_p95_tokens(static_cast<float>(Percentile(s.mass_by_distance, 0.95)));
      out->add_sink_mass_ratio(static_cast<float>(s.sink_mass / std::max(s.sink_queries, 1.0)));
      out->add_far_mass_ratio(static_cast<float>(s.far_mass / n));
      out->add_entropy_ratio(static_cast<float>(s.entropy / n));
      out->add_top_probability(static_cast<float>(s.top_probability / n));
      out->add_copy_hit_ratio(static_cast<float>(s.copy_hits / n));
      for (int b = 0; b < kDistanceBuckets; ++b) by_distance[b] += s.mass_by_distance[b];
    }
    const double queries = sums.at(l, 0).queries;
    for (double mass : by_distance) {
      out->add_mass_by_distance(static_cast<float>(mass / std::max(queries, 1.0)));
    }
    out->set_observed_queries(static_cast<uint64_t>(queries));
  }
  return to;
}

v1::SpanSnapshot ToProto(const SpanSnapshot& snapshot, const ModelSpec& spec,
                         const std::vector<uint32_t>& only) {
  v1::SpanSnapshot to = ToProto(snapshot.sums, spec, only);
  const int64_t nanoseconds = absl::ToUnixNanos(snapshot.observed_at);
  to.mutable_observed_at()->set_seconds(nanoseconds / 1'000'000'000);
  to.mutable_observed_at()->set_nanos(static_cast<int32_t>(nanoseconds % 1'000'000'000));
  to.set_observed_tokens(snapshot.observed_queries);
  to.set_observed_requests(snapshot.observed_requests);
  to.set_sequence(snapshot.sequence);
  return to;
}

SpanSnapshot Difference(const SpanSnapshot& now, const SpanSnapshot& before) {
  SpanSnapshot d = now;
  if (now.observed_queries < before.observed_queries) return d;  // reset in between
  d.observed_queries -= before.observed_queries;
  d.observed_requests -= std::min(before.observed_requests, d.observed_requests);
  for (size_t i = 0; i < d.sums.sums.size(); ++i) {
    HeadSums& a = d.sums.sums[i];
    const HeadSums& b = before.sums.sums[i];
    for (auto field :
         {&HeadSums::queries, &HeadSums::far_mass, &HeadSums::sink_mass, &HeadSums::sink_queries,
          &HeadSums::distance, &HeadSums::entropy, &HeadSums::top_probability, &HeadSums::copy_hits,
          &HeadSums::probe_mass, &HeadSums::beyond_window}) {
      a.*field -= b.*field;
    }
    for (int k = 0; k < kDistanceBuckets; ++k) a.mass_by_distance[k] -= b.mass_by_distance[k];
  }
  return d;
}

}  // namespace longspan
