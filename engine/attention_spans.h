#pragma once
// Totals of attention spans since start or reset, per layer and query head. The engine thread adds
// records of observed steps; any thread takes a snapshot without waiting for a step (short mutex).
#include <cstdint>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/request.h"
#include "models/spec.h"

namespace longspan {

enum class SpanLevel : uint8_t { kOff, kLayer, kHead };

struct SpanSnapshot {
  absl::Time observed_at;
  uint64_t sequence = 0;             // grows with each observed step
  uint64_t observed_queries = 0;
  uint64_t observed_requests = 0;    // that had at least one observed query
  uint64_t sampled_steps = 0, dropped_steps = 0;
  SpanSums sums;
};

class AttentionSpans {
 public:
  explicit AttentionSpans(const ModelSpec& spec);

  // One observed query row: records[layer * max_heads + head] of that row; `next` is the token that was
  // sampled from it and `tokens` the sequence so far (for copy hits: tokens[top_key] == next and
  // t - top_key >= W); `position` is t. Also adds into *request when given.
  void Add(const std::vector<SpanRecord>& records, int64_t position, int32_t next,
           absl::Span<const int32_t> tokens, SpanSums* request);
  void CountStep(bool observed);
  void CountRequest();
  SpanSnapshot Snapshot() const;     // any thread
  void Reset();                      // any thread

 private:
  const ModelSpec& spec_;
  mutable absl::Mutex mu_;
  SpanSnapshot totals_ ABSL_GUARDED_BY(mu_);
};

}  // namespace longspan
