#pragma once
// The decision of one step, as a pure function of (queues, cache numbers, time): no device, no lock, no
// clock, no randomness. Tested as a table. Engine thread only.
//
// Rules: one ragged step under a token budget. Running sequences that need one token (decode) come
// first; prefill chunks take what is left of the budget, but at least `min_prefill_tokens` of it are
// kept for them so that neither starves the other. Higher priority first, then earlier arrival. When
// pages run out the youngest sequence of the lowest priority is preempted: its pages are freed and it
// is queued again to be recomputed (prompt ++ output so far), ahead of its priority's later arrivals.
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/kv_cache.h"

namespace longspan {

struct SchedulerLimits {
  int max_batched_tokens = 512;      // of one step
  int max_running = 64;              // sequences with cache
  int max_queued_requests = 1024;
  int64_t max_queued_tokens = 8 << 20;
  int min_prefill_tokens = 64;       // of a step, when any prefill waits
};

using Ticket = uint64_t;             // the engine's name of one sequence (a choice of a request)

// What the scheduler knows of one sequence.
struct SequenceState {
  Ticket ticket = 0;
  int priority = 0;
  uint64_t arrival = 0;              // order of submission
  int64_t tokens = 0;                // prompt ++ output so far: what must be in the cache + 1 to go on
  int64_t computed = 0;              // of them, how many are in the cache
  int64_t max_tokens = 0;            // prompt + max_tokens: the most that it can grow to
  absl::Time deadline = absl::InfiniteFuture();
  bool running = false;              // has cache
};

struct BatchItem {
  Ticket ticket = 0;
  int64_t begin = 0;                 // positions [begin, begin + count) are computed in this step
  int count = 0;
};

struct Batch {
  std::vector<BatchItem> items;
  std::vector<Ticket> admitted;      // from queue to running, before the step
  std::vector<Ticket> preempted;     // cache to be freed before the step
  std::vector<Ticket> expired;       // deadline passed: to be failed, cache freed
  int tokens() const;
};

// The cache numbers that a decision needs; arithmetic on DemandOf, no pages touched.
struct CacheNumbers {
  CacheShape shape;
  int64_t superblock_bytes = 0;
  int superblocks = 0;
};

class Scheduler {
 public:
  Scheduler(const SchedulerLimits& limits, const CacheNumbers& cache);

  // Queues a sequence. InvalidArgument-free: checks only capacity. ResourceExhausted with the numbers
  // when it can never fit ("never") or a queue limit is reached ("queue").
  absl::Status Add(const SequenceState& sequence);
  Batch Next(absl::Time now);
  // After the step: `computed` positions are cached; `appended` tokens were sampled (0 or 1).
  void Commit(const BatchItem& item, int appended);
  void Remove(Ticket ticket);        // finished or cancelled

  int running() const;
  int queued() const;
  int64_t queued_tokens() const;
  bool idle() const { return running() == 0 && queued() == 0; }
  std::optional<SequenceState> Find(Ticket ticket) const;
};
}  // namespace longspan
