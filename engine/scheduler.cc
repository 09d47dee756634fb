#include "engine/scheduler.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace longspan {

int Batch::tokens() const {
  int sum = 0;
  for (const BatchItem& item : items) sum += item.count;
  return sum;
}

void Batch::Clear() {
  expired.clear();
  preempted.clear();
  admitted.clear();
  items.clear();
}

bool Scheduler::Precedes::operator()(const Entry* a, const Entry* b) const {
  if (a->priority != b->priority) return a->priority > b->priority;
  if (a->arrival != b->arrival) return a->arrival < b->arrival;
  return a->ticket < b->ticket;
}

Scheduler::Scheduler(const SchedulerLimits& limits, const CacheNumbers& cache)
    : limits_(limits), cache_(cache) {
  CHECK_GE(limits.max_batched_tokens, 1);
  CHECK_GE(limits.max_running, 1);
}

absl::Status Scheduler::Add(const SequenceState& sequence) {
  CHECK(!entries_.contains(sequence.ticket)) << "ticket " << sequence.ticket << " is known";
  CHECK_GE(sequence.tokens, 1);
  const int64_t most = std::max(sequence.tokens, sequence.max_tokens);
  const CacheDemand demand = DemandOf(cache_.shape, most);
  if (!cache_.Fits(demand)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("can never fit: ", most, " tokens need ", demand.paged_pages, " paged + ",
                     demand.ring_pages, " ring pages = ", demand.bytes, " bytes in ",
                     cache_.SuperblocksFor(demand), " superblocks, the cache holds ",
                     cache_.bytes(), " bytes in ", cache_.superblocks, " superblocks"));
  }
  if (queued() >= limits_.max_queued_requests) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "queue is full: ", queued(), " requests wait, the limit is ", limits_.max_queued_requests));
  }
  if (queued_tokens_ + sequence.tokens > limits_.max_queued_tokens) {
    return absl::ResourceExhaustedError(
        absl::StrCat("queue is full: ", queued_tokens_, " tokens wait, ", sequence.tokens,
                     " more exceed the limit of ", limits_.max_queued_tokens));
  }
  Entry* entry = Remember(sequence);
  entry->computed = 0;
  Enqueue(entry);
  return absl::OkStatus();
}

bool Scheduler::AddRunning(const SequenceState& sequence) {
  CHECK(!entries_.contains(sequence.ticket)) << "ticket " << sequence.ticket << " is known";
  Entry entry;
  static_cast<SequenceState&>(entry) = sequence;
  if (!queue_.empty() && !Precedes()(&entry, *queue_.begin())) return false;
  if (SequencesToDisplaceFor(entry) != 0) return false;
  Run(Remember(sequence));
  return true;
}

const Batch& Scheduler::Next(absl::Time now) {
  ++step_;
  batch_.Clear();
  Expire(now);
  Admit();
  SpendBudget();
  FitIntoCache();
  if (batch_.items.empty() && !running_.empty()) {
    // All whose turn it was wait for pages that others hold; the first in precedence need not wait.
    Entry* first = running_.front();
    const int64_t count = std::min<int64_t>(first->needed(), limits_.max_batched_tokens);
    candidates_.assign({{first, static_cast<int>(count)}});
    FitIntoCache();
  }
  return batch_;
}

void Scheduler::Expire(absl::Time now) {
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    const Ticket ticket = deadlines_.begin()->second;
    batch_.expired.push_back(ticket);
    Remove(ticket);
  }
}

// The queue's first is admitted only into a step that has budget for it; when that is so, all that
// is known of the running sequences fits together, so that FitIntoCache() preempts nothing in such
// a step.
void Scheduler::Admit() {
  while (!queue_.empty()) {
    Entry* waiting = *queue_.begin();
    if (PrefillBudgetAheadOf(*waiting) <= 0) return;
    const int displaced = SequencesToDisplaceFor(*waiting);
    if (displaced < 0) return;
    for (int i = 0; i < displaced; ++i) Preempt(running_.back());
    Start(waiting);
    batch_.admitted.push_back(waiting->ticket);
  }
}

// Tokens of the next step that those before `waiting` leave to it.
int Scheduler::PrefillBudgetAheadOf(const Entry& waiting) const {
  int64_t decodes = 0, prefill = 0;
  for (const Entry* entry : running_) {
    if (entry->needed() == 1) {
      ++decodes;
    } else if (Precedes()(entry, &waiting)) {
      prefill += entry->needed();
    }
  }
  const int64_t budget = limits_.max_batched_tokens -
                         std::min<int64_t>(decodes, DecodeBudget(/*prefill_waits=*/true)) - prefill;
  return static_cast<int>(std::max<int64_t>(budget, 0));
}

// How many running sequences, from the last in precedence, must give way to admit `waiting`; -1 if
// it does not fit even when all of lower priority did.
int Scheduler::SequencesToDisplaceFor(const Entry& waiting) const {
  CacheDemand demand = GrownDemand(waiting);
  for (const Entry* entry : running_) demand += GrownDemand(*entry);
  int displaced = 0;
  for (auto victim = running_.rbegin();; ++victim, ++displaced) {
    if (running() - displaced < limits_.max_running && cache_.Fits(demand)) return displaced;
    if (victim == running_.rend() || (*victim)->priority >= waiting.priority) return -1;
    demand -= GrownDemand(**victim);
  }
}

// Who takes part in the step, by the token budget alone, in precedence order.
void Scheduler::SpendBudget() {
  decodes_.clear();
  prefills_.clear();
  for (Entry* entry : running_) {
    if (entry->needed() == 1) decodes_.push_back({entry, 1});
    if (entry->needed() > 1) prefills_.push_back({entry, 0});
  }
  std::sort(decodes_.begin(), decodes_.end(), [](const Candidate& a, const Candidate& b) {
    if (a.entry->priority != b.entry->priority) return a.entry->priority > b.entry->priority;
    if (a.entry->considered != b.entry->considered) {
      return a.entry->considered < b.entry->considered;
    }
    return Precedes()(a.entry, b.entry);
  });
  int64_t left = limits_.max_batched_tokens;
  const int64_t first_decodes =
      std::min<int64_t>(decodes_.size(), DecodeBudget(/*prefill_waits=*/!prefills_.empty()));
  left -= first_decodes;
  for (Candidate& prefill : prefills_) {
    prefill.count = static_cast<int>(std::min(left, prefill.entry->needed()));
    left -= prefill.count;
  }
  decodes_.resize(std::min<int64_t>(decodes_.size(), first_decodes + left));

  candidates_.assign(decodes_.begin(), decodes_.end());
  for (const Candidate& prefill : prefills_) {
    if (prefill.count > 0) candidates_.push_back(prefill);
  }
  std::sort(candidates_.begin(), candidates_.end(),
            [](const Candidate& a, const Candidate& b) { return Precedes()(a.entry, b.entry); });
}

// Gives pages in precedence order. A prefill chunk shrinks to what fits; if not one token fits, the
// last in precedence gives way; the last itself waits, with its pages, until it must give way.
void Scheduler::FitIntoCache() {
  CacheDemand held;
  for (const Entry* entry : running_) held += DemandOf(cache_.shape, entry->computed);
  for (const auto& [entry, wanted] : candidates_) {
    if (!entry->running) continue;  // gave way to an earlier one
    entry->considered = step_;
    CacheDemand others = held;
    others -= DemandOf(cache_.shape, entry->computed);
    while (FittingTokens(*entry, wanted, others) == 0 && running_.back() != entry) {
      others -= DemandOf(cache_.shape, running_.back()->computed);
      Preempt(running_.back());
    }
    const int count = FittingTokens(*entry, wanted, others);
    held = others;
    held += DemandOf(cache_.shape, entry->computed + count);
    if (count > 0) batch_.items.push_back({entry->ticket, entry->computed, count});
  }
}

// The most of `wanted` further tokens for which the sequence fits beside what `others` hold.
int Scheduler::FittingTokens(const Entry& entry, int wanted, const CacheDemand& others) const {
  const auto fits = [&](int count) {
    CacheDemand demand = DemandOf(cache_.shape, entry.computed + count);
    demand += others;
    return cache_.Fits(demand);
  };
  if (fits(wanted)) return wanted;
  int fitting = 0, beyond = wanted;
  while (beyond - fitting > 1) {
    const int middle = fitting + (beyond - fitting) / 2;
    (fits(middle) ? fitting : beyond) = middle;
  }
  return fitting;
}

void Scheduler::Commit(const BatchItem& item, int appended) {
  const auto found = entries_.find(item.ticket);
  if (found == entries_.end()) return;
  Entry& entry = *found->second;
  CHECK(entry.running);
  CHECK_EQ(entry.computed, item.begin);
  entry.computed += item.count;
  entry.tokens += appended;
  CHECK_LE(entry.computed, entry.tokens);
  CHECK_LE(entry.tokens, entry.max_tokens);
}

void Scheduler::Remove(Ticket ticket) {
  const auto found = entries_.find(ticket);
  if (found != entries_.end()) Forget(found->second.get());
}

std::optional<SequenceState> Scheduler::Find(Ticket ticket) const {
  const auto found = entries_.find(ticket);
  if (found == entries_.end()) return std::nullopt;
  return *found->second;
}

int Scheduler::DecodeBudget(bool prefill_waits) const {
  const int budget = limits_.max_batched_tokens;
  if (!prefill_waits) return budget;
  if (budget == 1) return step_ % 2;  // the two take turns
  return budget - std::clamp(limits_.min_prefill_tokens, 1, budget / 2);
}

// What the sequence occupies when all its tokens are cached and it has grown by a page.
CacheDemand Scheduler::GrownDemand(const Entry& entry) const {
  return DemandOf(cache_.shape,
                  std::min(entry.tokens + cache_.shape.page_tokens, entry.max_tokens));
}

Scheduler::Entry* Scheduler::Remember(const SequenceState& sequence) {
  auto entry = std::make_unique<Entry>();
  static_cast<SequenceState&>(*entry) = sequence;
  entry->max_tokens = std::max(sequence.tokens, sequence.max_tokens);
  if (sequence.deadline != absl::InfiniteFuture()) {
    deadlines_.emplace(sequence.deadline, sequence.ticket);
  }
  return (entries_[sequence.ticket] = std::move(entry)).get();
}

void Scheduler::Enqueue(Entry* entry) {
  entry->running = false;
  queue_.insert(entry);
  queued_tokens_ += entry->tokens;
}

void Scheduler::Start(Entry* entry) {
  queue_.erase(entry);
  queued_tokens_ -= entry->tokens;
  Run(entry);
}

void Scheduler::Run(Entry* entry) {
  entry->running = true;
  running_.insert(std::upper_bound(running_.begin(), running_.end(), entry, Precedes()), entry);
}

void Scheduler::Preempt(Entry* entry) {
  CHECK(running_.back() == entry);
  running_.pop_back();
  entry->computed = 0;
  batch_.preempted.push_back(entry->ticket);
  Enqueue(entry);
}

void Scheduler::Forget(Entry* entry) {
  if (entry->running) {
    running_.erase(std::find(running_.begin(), running_.end(), entry));
  } else {
    queue_.erase(entry);
    queued_tokens_ -= entry->tokens;
  }
  deadlines_.erase({entry->deadline, entry->ticket});
  entries_.erase(entry->ticket);
}

}  // namespace longspan
