// The scheduler and a real cache together: what one promises the other grants, and everything ends.
#include <random>
#include <set>

#include "gtest/gtest.h"
#include "tests/support/cache_case.h"
#include "tests/support/scheduler_case.h"

namespace longspan {
namespace {

// Runs the engine's part against both and checks, each step, what must hold between them.
class Pair {
 public:
  Pair(const SchedulerLimits& limits, const std::vector<CacheLayer>& layers, int page_tokens,
       int64_t bytes)
      : limits_(limits),
        cache_(*KvCache::Create(backend_, CacheSpec(layers), DType::kF32, page_tokens, bytes,
                                limits.max_running, 1 << 20)),
        play_(limits, cache_->numbers()) {}

  void Step(int time) {
    const bool work = !play_.scheduler.idle();
    const Batch batch = play_.scheduler.Next(absl::FromUnixSeconds(time));
    CheckLists(batch);
    for (Ticket ticket : batch.expired) Close(ticket);
    for (Ticket ticket : batch.preempted) {
      EXPECT_TRUE(open_.count(ticket));
      ++play_.preemptions[ticket];
      Close(ticket);
    }
    CheckVictims(batch);
    for (Ticket ticket : batch.admitted) {
      open_[ticket] = cache_->Open();
      EXPECT_GE(open_[ticket], 0);
    }
    EXPECT_EQ(batch.items.empty(), !work || play_.scheduler.idle());
    EXPECT_LE(batch.tokens(), limits_.max_batched_tokens);
    for (const BatchItem& item : batch.items) {
      ASSERT_TRUE(open_.count(item.ticket));
      ASSERT_EQ(cache_->committed(open_[item.ticket]), item.begin);
      ASSERT_TRUE(cache_->Reserve(open_[item.ticket], item.begin + item.count));
    }
    for (const BatchItem& item : batch.items) {
      cache_->Commit(open_[item.ticket], item.begin + item.count);
      play_.Commit(item);
      if (!play_.scheduler.Find(item.ticket).has_value()) Close(item.ticket);
    }
    CheckBytes();
  }

  void Cancel(Ticket ticket) {
    play_.scheduler.Remove(ticket);
    Close(ticket);
  }

  SchedulerPlay& play() { return play_; }
  KvCache& cache() { return *cache_; }

 private:
  void Close(Ticket ticket) {
    const auto found = open_.find(ticket);
    if (found == open_.end()) return;
    cache_->Close(found->second);
    open_.erase(found);
  }

  void CheckLists(const Batch& batch) {
    std::set<Ticket> seen;
    for (const auto* list : {&batch.expired, &batch.preempted, &batch.admitted}) {
      for (Ticket ticket : *list) EXPECT_TRUE(seen.insert(ticket).second) << ticket;
    }
    std::set<Ticket> items;
    for (const BatchItem& item : batch.items) {
      EXPECT_TRUE(items.insert(item.ticket).second);
      EXPECT_GT(item.count, 0);
    }
  }

  // Whoever gave way stands behind all who stayed: lower priority, or as high and later.
  void CheckVictims(const Batch& batch) {
    for (Ticket victim : batch.preempted) {
      const SequenceState v = *play_.scheduler.Find(victim);
      EXPECT_FALSE(v.running);
      EXPECT_EQ(v.computed, 0);
      for (const auto& [ticket, sequence] : open_) {
        const SequenceState s = *play_.scheduler.Find(ticket);
        EXPECT_TRUE(v.priority < s.priority || (v.priority == s.priority && v.arrival > s.arrival));
      }
    }
  }

  void CheckBytes() {
    int64_t bytes = 0;
    for (const auto& [ticket, sequence] : open_) {
      bytes += DemandOf(cache_->shape(), play_.scheduler.Find(ticket)->computed).bytes;
    }
    EXPECT_EQ(cache_->Usage().used_bytes, bytes);
    EXPECT_EQ(play_.scheduler.running(), static_cast<int>(open_.size()));
  }

  SchedulerLimits limits_;
  HostBackend backend_;
  std::unique_ptr<KvCache> cache_;
  SchedulerPlay play_;
  std::map<Ticket, SequenceId> open_;
};

TEST(Preemption, TheCacheGrantsEveryBatchAndAllSequencesFinishOver100000Steps) {
  Random random(8);
  int64_t steps = 0, preemptions = 0, finished = 0, expired_or_cancelled = 0;
  while (steps < 100000) {
    const std::vector<CacheLayer> layers = RandomLayers(random, /*same_window=*/false);
    const int page_tokens = Pick(random, 1, 9);
    const SchedulerLimits limits = {.max_batched_tokens = Pick(random, 1, 60),
                                    .max_running = Pick(random, 1, 12),
                                    .max_queued_requests = 30,
                                    .min_prefill_tokens = Pick(random, 0, 40)};
    const CacheShape shape = ShapeOf(CacheSpec(layers), DType::kF32, page_tokens);
    Pair pair(limits, layers, page_tokens, BytesToHold(shape, 120) * Pick(random, 1, 3));
    std::vector<Ticket> alive;
    Ticket next = 1;
    int64_t owed = 0;  // tokens of all that were accepted
    const int busy = 1500;
    int step = 0;
    for (; step < busy || !pair.play().scheduler.idle(); ++step) {
      if (step < busy && Pick(random, 0, 3) == 0) {
        const int64_t prompt = Pick(random, 1, 100), most = prompt + Pick(random, 1, 60);
        const absl::Time deadline = Pick(random, 0, 9) == 0
                                        ? absl::FromUnixSeconds(step + Pick(random, 0, 60))
                                        : absl::InfiniteFuture();
        if (pair.play().Add(next, Pick(random, 0, 2), prompt, most, deadline).ok()) {
          alive.push_back(next);
          owed += most;
        }
        ++next;
      }
      if (step < busy && !alive.empty() && Pick(random, 0, 30) == 0) {
        pair.Cancel(alive[Pick(random, 0, static_cast<int>(alive.size()) - 1)]);
      }
      pair.Step(step);
      if (step % 50 == 0) {
        ASSERT_TRUE(pair.cache().CheckIntegrity().ok()) << pair.cache().CheckIntegrity();
      }
      if (::testing::Test::HasFailure()) return;
      // Each step computes a token; only what was preempted is computed again, once per preemption.
      ASSERT_LT(step, busy + owed + 160 * 30 * 30) << "no end";
    }
    EXPECT_EQ(pair.cache().Usage().used_bytes, 0);
    steps += step;
    for (const auto& [ticket, count] : pair.play().preemptions) preemptions += count;
    finished += pair.play().finished.size();
    expired_or_cancelled += alive.size() - pair.play().finished.size();
  }
  EXPECT_GT(preemptions, 1000);
  EXPECT_GT(finished, 3000);
  EXPECT_GT(expired_or_cancelled, 300);
}

// Each alone fits, no two do: they cannot displace each other in turn.
TEST(Preemption, SequencesThatFitOnlyAloneFinishInOrderOfArrival) {
  for (int count : {2, 8}) {
    SchedulerPlay play({.max_batched_tokens = 16, .max_running = 8}, PlainPages(16));
    for (int t = 1; t <= count; ++t) ASSERT_TRUE(play.Add(t, 0, 4, 64).ok());
    int steps = 0;
    while (!play.scheduler.idle()) {
      play.Step();
      ASSERT_LT(++steps, 64 * count * 2);
    }
    std::vector<Ticket> expected;
    for (int t = 1; t <= count; ++t) expected.push_back(t);
    EXPECT_EQ(play.finished, expected);
    EXPECT_EQ(play.preemptions.count(1), 0u);  // the first in precedence never gives way
    for (const auto& [ticket, times] : play.preemptions) {
      // At most once for each of those before it.
      EXPECT_LT(times, static_cast<int>(ticket));
    }
  }
}

TEST(Preemption, ALowerPriorityAdvancesInTheGapsOfAHigherOne) {
  SchedulerPlay play({.max_batched_tokens = 16, .max_running = 4}, PlainPages(16));
  ASSERT_TRUE(play.Add(1, 0, 8, 60).ok());
  for (int step = 0; step < 500; ++step) {
    if (step < 300 && step % 20 == 0) {
      ASSERT_TRUE(play.Add(100 + step, 1, 30, 40).ok());
    }
    play.Step();
  }
  EXPECT_EQ(play.finished.size(), 16u);
  EXPECT_GT(play.preemptions[1], 0);
}

TEST(Preemption, APreemptedSequenceRecomputesPromptAndOutput) {
  SchedulerPlay play({.max_batched_tokens = 5, .max_running = 1}, PlainPages(100));
  ASSERT_TRUE(play.Add(1, 0, 6, 20).ok());
  for (int i = 0; i < 4; ++i) play.Step();  // 5 + 1, then two decodes: 3 tokens out
  ASSERT_EQ(play.scheduler.Find(1)->tokens, 9);
  ASSERT_TRUE(play.Add(2, 1, 3, 4).ok());
  EXPECT_EQ(ToText(play.Step()), "preempted 1; admitted 2; 2@0+3");
  EXPECT_EQ(ToText(play.Step()), "admitted 1; 1@0+5");
  EXPECT_EQ(ToText(play.Step()), "1@5+4");
  EXPECT_EQ(ToText(play.Step()), "1@9+1");
}

}  // namespace
}  // namespace longspan
