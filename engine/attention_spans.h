#pragma once
// Totals of attention spans since start or reset, per layer and query head. The engine thread adds
// records of observed steps, a step's while the device is at the next or when a request ends; any
// thread takes a snapshot without waiting for a step (short mutex).
#include <cstdint>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/request.h"
#include "kernels/span_record.h"
#include "models/spec.h"

namespace longspan {

enum class SpanLevel : uint8_t { kOff, kLayer, kHead };

struct SpanSnapshot {
  absl::Time observed_at;
  uint64_t sequence = 0;  // grows with each observed step
  uint64_t observed_queries = 0;
  uint64_t observed_requests = 0;  // that had at least one observed query
  uint64_t sampled_steps = 0, dropped_steps = 0;
  SpanSums sums;
  // Per layer and head: the mean distance, each query weighing kRecentWeight less than the next.
  std::vector<double> recent_distance;
};
inline constexpr double kRecentWeight = 1.0 / 64;

// The records of one observed query row, among those of its step: of each layer [rows, heads].
struct SpanRow {
  const SpanRecord* step = nullptr;
  size_t layer_stride = 0;
  size_t index = 0;  // of the row

  const SpanRecord* Layer(int layer, int heads) const {
    return step + layer * layer_stride + index * heads;
  }
};

// Adds one observed query row to `sums`. `position` is t, `tokens` the sequence so far, `next` the
// token that was sampled from the row. A copy hit is tokens[top_key] == next with t - top_key >= W;
// sink mass counts where t >= kSinkTokens + W (the online form of Wu et al., arXiv 2404.15574). A
// model without window layers has no W: no far mass, no copy hits. Dies if a window layer put mass
// beyond its own window.
void AddRow(const ModelSpec& spec, const SpanRow& row, int64_t position,
            absl::Span<const int32_t> tokens, int32_t next, SpanSums& sums);
SpanSums EmptySums(const ModelSpec& spec);

class AttentionSpans {
 public:
  explicit AttentionSpans(const ModelSpec& spec);

  // As AddRow(), into the totals.
  void Add(const SpanRow& row, int64_t position, absl::Span<const int32_t> tokens, int32_t next);
  void CountStep(bool observed);  // a decode step was due to be observed; observed or dropped
  void CountRequest();
  SpanSnapshot Snapshot() const;  // any thread
  void Reset();                   // any thread

 private:
  void Clear() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);  // all but the sequence

  const ModelSpec& spec_;
  mutable absl::Mutex mu_;
  SpanSnapshot totals_ ABSL_GUARDED_BY(mu_);
};

}  // namespace longspan
