#pragma once
// What one query row and head has seen so far, under the online softmax: O(1) state, rescaled and
// merged by the rules of the running maximum. With a new maximum m', a = e^(m - m'):
//   sums of e^(s - m) weights        → a * sum
//   h = sum of e^(s - m) (s - m)     → a * (h + (m - m') l)
#include <cmath>
#include <cstdint>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/simd.h"
#include "kernels/span_record.h"

namespace longspan::cpu {

struct SpanState {
  double max = -INFINITY;  // m
  double l = 0;            // sum of weights
  double h = 0;
  double distance = 0;  // weight * (t - j), sinks excluded
  double far = 0, sink = 0, probe = 0, beyond = 0;
  double buckets[kDistanceBuckets] = {};
  float top_score = 0;
  int32_t top_key = -1;

  // Key j at logit `score` of the query at t.
  struct Edges {
    int64_t position = 0;  // t
    int far_window = 0;    // the model's window; 0: none
    int own_window = 0;    // the layer's; 0: none
    const ProbeRange* probes = nullptr;
    int probe_count = 0;
  };
  // Scores of the kBlockKeys keys from `first` on, -inf where masked.
  void Add(const Edges& edges, int64_t first, const float* scores, Simd simd);
  void Merge(const SpanState& later);
  // sink_logit: a learned sink's logit, which takes mass; -inf: none.
  SpanRecord Record(int64_t position, double sink_logit) const;

 private:
  void RaiseTo(double max);
  void AddProbes(const Edges& edges, int64_t first, const float* weights);
};

}  // namespace longspan::cpu
