#pragma once
// Plays the engine to a Scheduler: submits sequences at given steps, samples a token whenever a
// sequence's last position is computed, removes what is finished, and writes batches as text.
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/scheduler.h"

namespace longspan {

// A cache of `pages` pages of 4 tokens each, all for full-attention layers.
inline CacheNumbers PlainPages(int pages) {
  return {{.page_tokens = 4, .paged_page_bytes = 256}, 256, pages};
}

// "preempted 2; admitted 3; 1@8+1 3@0+4": sequence 3 computes positions 0 to 3.
inline std::string ToText(const Batch& batch) {
  std::vector<std::string> parts;
  const auto list = [&](const char* name, const std::vector<Ticket>& tickets) {
    if (!tickets.empty()) parts.push_back(absl::StrCat(name, " ", absl::StrJoin(tickets, " ")));
  };
  list("expired", batch.expired);
  list("preempted", batch.preempted);
  list("admitted", batch.admitted);
  if (!batch.items.empty()) {
    parts.push_back(absl::StrJoin(batch.items, " ", [](std::string* out, const BatchItem& item) {
      absl::StrAppend(out, item.ticket, "@", item.begin, "+", item.count);
    }));
  }
  return absl::StrJoin(parts, "; ");
}

class SchedulerPlay {
 public:
  SchedulerPlay(const SchedulerLimits& limits, const CacheNumbers& numbers)
      : scheduler(limits, numbers) {}

  absl::Status Add(Ticket ticket, int priority, int64_t prompt, int64_t max_tokens,
                   absl::Time deadline = absl::InfiniteFuture()) {
    return scheduler.Add({.ticket = ticket,
                          .priority = priority,
                          .arrival = ticket,
                          .tokens = prompt,
                          .max_tokens = max_tokens,
                          .deadline = deadline});
  }

  // One step at `time` seconds after the epoch.
  Batch Step(int time = 0) {
    const Batch batch = scheduler.Next(absl::FromUnixSeconds(time));
    for (Ticket ticket : batch.preempted) ++preemptions[ticket];
    for (const BatchItem& item : batch.items) Commit(item);
    return batch;
  }

  void Commit(const BatchItem& item) {
    const SequenceState before = *scheduler.Find(item.ticket);
    const bool sampled = item.begin + item.count == before.tokens;
    scheduler.Commit(item, sampled ? 1 : 0);
    if (sampled && before.tokens + 1 == before.max_tokens) {
      scheduler.Remove(item.ticket);
      finished.push_back(item.ticket);
    }
  }

  Scheduler scheduler;
  std::vector<Ticket> finished;  // in order
  std::map<Ticket, int> preemptions;
};

}  // namespace longspan
