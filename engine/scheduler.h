#pragma once
// What runs in the next step: a pure function of queues, cache numbers and time. No device, no
// lock, no clock: same calls, same batches. Engine thread only.
//
// Rules. One ragged step under a token budget. Running sequences that need one token (decode) come
// first; prefill chunks take what is left of the budget, but at least `min_prefill_tokens` of it
// (never more than half the budget) are kept for them so that neither starves the other. Decodes
// that a small budget leaves out come first in the next step.
//
// Precedence: higher priority first, then earlier arrival. The queue is served strictly in that
// order: what does not fit is waited for, never overtaken. A sequence is admitted when the cache
// could hold all its tokens and all those of the running ones, with a page of growth each; for a
// higher priority, running sequences of lower priority give way.
//
// When pages run out the youngest sequence of the lowest priority is preempted: its pages are freed
// and it is queued again to be recomputed (prompt ++ output so far), ahead of its priority's later
// arrivals. A sequence only ever displaces those behind it in precedence, which never changes. So
// the first in precedence always advances, alone in the cache if it must, and finishes; then the
// next is first: no two can displace each other in turn, and within a priority nothing waits for
// ever.
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/kv_cache.h"

namespace longspan {

struct SchedulerLimits {
  int max_batched_tokens = 512;  // of one step
  int max_running = 64;          // sequences with cache
  int max_queued_requests = 1024;
  int64_t max_queued_tokens = 8 << 20;
  int min_prefill_tokens = 64;  // of a step, when any prefill waits
};

using Ticket = uint64_t;  // the engine's name of one sequence (a choice of a request)

// What the scheduler knows of one sequence.
struct SequenceState {
  Ticket ticket = 0;
  int priority = 0;
  uint64_t arrival = 0;    // order of submission
  int64_t tokens = 0;      // prompt ++ output so far: what must be in the cache + 1 to go on
  int64_t computed = 0;    // of them, how many are in the cache
  int64_t max_tokens = 0;  // prompt + max_tokens: the most that it can grow to
  absl::Time deadline = absl::InfiniteFuture();
  bool running = false;  // has cache
};

struct BatchItem {
  Ticket ticket = 0;
  int64_t begin = 0;  // positions [begin, begin + count) are computed in this step
  int count = 0;
};

// To be applied in this order: close the caches of expired and preempted, open those of admitted,
// reserve and compute items. No ticket is in two of the first three lists.
struct Batch {
  std::vector<Ticket> expired;    // deadline passed: forgotten; to be failed, cache freed
  std::vector<Ticket> preempted;  // cache to be freed before the step
  std::vector<Ticket> admitted;   // from queue to running, before the step
  std::vector<BatchItem> items;   // in precedence order; a ticket at most once
  int tokens() const;
  void Clear();
};

class Scheduler {
 public:
  Scheduler(const SchedulerLimits& limits, const CacheNumbers& cache);

  // Queues a sequence (computed and running are taken as 0 and false). Checks only capacity:
  // ResourceExhausted with the numbers when it "can never fit" or when the "queue is full".
  absl::Status Add(const SequenceState& sequence);
  // Lets a sequence whose `computed` tokens are cached already (a fork, between steps) run at once,
  // if it displaces none that runs and overtakes none that waits; else false, and nothing changes.
  bool AddRunning(const SequenceState& sequence);
  // The next step. KvCache::Reserve grants every item of it, provided that the cache was created
  // with the same numbers, holds only these sequences, and each has just its computed tokens. Has
  // items whenever a sequence is queued or running that still needs tokens. Valid until the next
  // call.
  const Batch& Next(absl::Time now);
  // After the step: `item`'s positions are cached; `appended` tokens were sampled (0 or 1). Ignored
  // for a ticket that was removed meanwhile.
  void Commit(const BatchItem& item, int appended);
  void Remove(Ticket ticket);  // finished or cancelled; nothing if unknown

  int running() const { return static_cast<int>(running_.size()); }
  int queued() const { return static_cast<int>(queue_.size()); }
  int64_t queued_tokens() const { return queued_tokens_; }
  bool idle() const { return running() == 0 && queued() == 0; }
  std::optional<SequenceState> Find(Ticket ticket) const;

 private:
  struct Entry : SequenceState {
    uint64_t considered = 0;  // the last step in which it had its turn
    int64_t needed() const { return tokens - computed; }
  };
  struct Precedes {
    bool operator()(const Entry* a, const Entry* b) const;
  };
  struct Candidate {
    Entry* entry;
    int count;
  };

  void Expire(absl::Time now);
  void Admit();
  int PrefillBudgetAheadOf(const Entry& waiting) const;
  int SequencesToDisplaceFor(const Entry& waiting) const;
  void SpendBudget();
  void FitIntoCache();
  int FittingTokens(const Entry& entry, int wanted, const CacheDemand& others) const;

  int DecodeBudget(bool prefill_waits) const;
  CacheDemand GrownDemand(const Entry& entry) const;
  Entry* Remember(const SequenceState& sequence);
  void Enqueue(Entry* entry);
  void Start(Entry* entry);
  void Run(Entry* entry);
  void Preempt(Entry* entry);
  void Forget(Entry* entry);

  const SchedulerLimits limits_;
  const CacheNumbers cache_;
  absl::flat_hash_map<Ticket, std::unique_ptr<Entry>> entries_;
  std::set<Entry*, Precedes> queue_;
  std::vector<Entry*> running_;                        // in precedence order
  std::set<std::pair<absl::Time, Ticket>> deadlines_;  // the finite ones
  int64_t queued_tokens_ = 0;
  uint64_t step_ = 0;
  // Of a step; members so that they keep their memory.
  Batch batch_;
  std::vector<Candidate> decodes_, prefills_, candidates_;
};

}  // namespace longspan
