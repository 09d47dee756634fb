#pragma once
// Attention-span sums to the API's means and percentiles.
#include <vector>

#include "absl/time/time.h"
#include "engine/attention_spans.h"
#include "longspan/v1/attention.pb.h"
#include "models/spec.h"

namespace longspan {

v1::LayerKind KindOf(const LayerSpec& layer);
const char* KindName(
    const LayerSpec& layer);           // "full", "sliding", "linear": metric label and tables
int WindowOf(const LayerSpec& layer);  // 0: none

// Layers not in `only` are left out; empty: all.
v1::SpanSnapshot ToProto(const SpanSums& sums, const ModelSpec& spec,
                         const std::vector<uint32_t>& only);
v1::SpanSnapshot ToProto(const SpanSnapshot& snapshot, const ModelSpec& spec,
                         const std::vector<uint32_t>& only);
// What `now` has that `before` had not.
SpanSnapshot Difference(const SpanSnapshot& now, const SpanSnapshot& before);

// Distance below which `share` of the mass lies, interpolated inside its power-of-two bucket.
double Percentile(const double (&mass_by_distance)[kDistanceBuckets], double share);

}  // namespace longspan
