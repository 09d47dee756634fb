// The scheduler as a table: queues in, batches out. All expected batches were worked out by hand.
#include "engine/scheduler.h"

#include <algorithm>
#include <chrono>

#include "gtest/gtest.h"
#include "tests/support/scheduler_case.h"

namespace longspan {
namespace {

struct Arrival {
  int step;  // the first step that sees it, from 1
  Ticket ticket;
  int priority;
  int64_t prompt, max_tokens;
  int deadline = 0;  // step at which it has passed; 0: none
};

struct Case {
  const char* name;
  int budget, min_prefill, max_running, pages;
  std::vector<Arrival> arrivals;
  std::vector<std::string> batches;
};

class SchedulerTable : public ::testing::TestWithParam<Case> {};

TEST_P(SchedulerTable, GivesTheBatches) {
  const Case& c = GetParam();
  SchedulerPlay play({.max_batched_tokens = c.budget,
                      .max_running = c.max_running,
                      .min_prefill_tokens = c.min_prefill},
                     PlainPages(c.pages));
  for (size_t i = 0; i < c.batches.size(); ++i) {
    const int step = static_cast<int>(i) + 1;
    for (const Arrival& a : c.arrivals) {
      if (a.step != step) continue;
      ASSERT_TRUE(
          play.Add(a.ticket, a.priority, a.prompt, a.max_tokens,
                   a.deadline > 0 ? absl::FromUnixSeconds(a.deadline) : absl::InfiniteFuture())
              .ok());
    }
    EXPECT_EQ(ToText(play.Step(step)), c.batches[i]) << "step " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Each, SchedulerTable,
    ::testing::Values(
        Case{"APromptIsCutToTheBudgetAndThenDecoded",
             8,
             4,
             8,
             100,
             {{1, 1, 0, 20, 22}},
             {"admitted 1; 1@0+8", "1@8+8", "1@16+4", "1@20+1", ""}},
        Case{"PromptsShareAStepInOrderOfArrival",
             16,
             4,
             8,
             100,
             {{1, 1, 0, 6, 9}, {1, 2, 0, 20, 30}, {1, 3, 0, 5, 9}},
             {"admitted 1 2; 1@0+6 2@0+10", "admitted 3; 1@6+1 2@10+10 3@0+5"}},
        // Half of 4 is for prefill; three decodes take turns over the other half.
        Case{"DecodeAndPrefillShareASmallBudget",
             4,
             2,
             8,
             100,
             {{1, 1, 0, 1, 50}, {1, 2, 0, 1, 50}, {1, 3, 0, 1, 50}, {2, 4, 0, 10, 50}},
             {"admitted 1 2 3; 1@0+1 2@0+1 3@0+1", "admitted 4; 1@1+1 2@1+1 4@0+2",
              "1@2+1 3@1+1 4@2+2", "1@3+1 2@2+1 4@4+2", "1@4+1 3@2+1 4@6+2"}},
        Case{"ABudgetOfOneTokenAlternates",
             1,
             64,
             8,
             100,
             {{1, 1, 0, 1, 9}, {1, 2, 0, 3, 4}},
             {"admitted 1; 1@0+1", "admitted 2; 2@0+1", "1@1+1", "2@1+1", "1@2+1", "2@2+1",
              "1@3+1"}},
        Case{"AFullHouseLetsTheQueueWait",
             8,
             4,
             1,
             100,
             {{1, 1, 0, 4, 6}, {1, 2, 0, 4, 6}},
             {"admitted 1; 1@0+4", "1@4+1", "admitted 2; 2@0+4", "2@4+1", ""}},
        Case{"HigherPriorityIsAdmittedFirst",
             8,
             4,
             8,
             100,
             {{1, 1, 0, 8, 9}, {1, 2, 5, 8, 9}},
             {"admitted 2; 2@0+8", "admitted 1; 1@0+8", ""}},
        Case{"ALowerPriorityGivesItsPlaceToAHigherOne",
             8,
             4,
             1,
             100,
             {{1, 1, 0, 4, 9}, {2, 2, 1, 4, 5}},
             {"admitted 1; 1@0+4", "preempted 1; admitted 2; 2@0+4", "admitted 1; 1@0+5"}},
        // 4 pages of 4. Sequence 2 could come to need all 4.
        Case{"ALowerPriorityGivesItsPagesToAHigherOne",
             16,
             4,
             8,
             4,
             {{1, 1, 0, 8, 12}, {2, 2, 1, 12, 14}},
             {"admitted 1; 1@0+8", "preempted 1; admitted 2; 2@0+12", "2@12+1",
              "admitted 1; 1@0+9"}},
        Case{"TheSamePriorityGivesNothing",
             16,
             4,
             8,
             4,
             {{1, 1, 0, 8, 12}, {2, 2, 0, 12, 14}},
             {"admitted 1; 1@0+8", "1@8+1", "1@9+1", "1@10+1", "admitted 2; 2@0+12"}},
        Case{"NothingIsTakenFromTheLowerIfItWouldNotHelp",
             16,
             4,
             8,
             4,
             {{1, 1, 1, 8, 12}, {1, 2, 0, 2, 4}, {2, 3, 1, 8, 12}},
             {"admitted 1 2; 1@0+8 2@0+2", "1@8+1 2@2+1", "1@9+1", "1@10+1", "admitted 3; 3@0+8"}},
        // Sequence 3 would fit beside 1 at once, but 2 came before it.
        Case{"ASmallRequestDoesNotOvertakeALargeOne",
             16,
             4,
             8,
             4,
             {{1, 1, 0, 8, 12}, {1, 2, 0, 8, 16}, {1, 3, 0, 2, 3}},
             {"admitted 1; 1@0+8", "1@8+1", "1@9+1", "1@10+1", "admitted 2 3; 2@0+8 3@0+2"}},
        // Each holds 2 of 4 pages when the first needs its third.
        Case{"TheYoungestIsPreemptedAndRecomputedBeforeLaterArrivals",
             16,
             4,
             8,
             4,
             {{1, 1, 0, 4, 16}, {1, 2, 0, 4, 16}, {7, 3, 0, 1, 2}},
             {"admitted 1 2; 1@0+4 2@0+4",
              "1@4+1 2@4+1",
              "1@5+1 2@5+1",
              "1@6+1 2@6+1",
              "1@7+1 2@7+1",
              "preempted 2; 1@8+1",
              "1@9+1",
              "1@10+1",
              "1@11+1",
              "1@12+1",
              "1@13+1",
              "1@14+1",
              "admitted 2; 2@0+9",
              "2@9+1",
              "2@10+1",
              "2@11+1",
              "2@12+1",
              "2@13+1",
              "2@14+1",
              "admitted 3; 3@0+1"}},
        Case{"TheLowestPriorityIsPreemptedBeforeTheYoungest",
             16,
             4,
             8,
             6,
             {{1, 1, 0, 4, 12}, {1, 2, 0, 4, 12}, {1, 3, 1, 4, 12}},
             {"admitted 3 1 2; 3@0+4 1@0+4 2@0+4", "3@4+1 1@4+1 2@4+1", "3@5+1 1@5+1 2@5+1",
              "3@6+1 1@6+1 2@6+1", "3@7+1 1@7+1 2@7+1", "preempted 2; 3@8+1 1@8+1"}},
        // Prefill of one token a step; 6 pages. In step 11 sequence 1 takes the last page; 2 keeps
        // its two pages until 1 needs one of them.
        Case{"TheLastWaitsWithItsPagesUntilTheyAreNeeded",
             2,
             1,
             8,
             6,
             {{1, 1, 0, 4, 20}, {1, 2, 0, 11, 12}},
             {"admitted 1; 1@0+2", "1@2+2", "admitted 2; 1@4+1 2@0+1", "1@5+1 2@1+1", "1@6+1 2@2+1",
              "1@7+1 2@3+1", "1@8+1 2@4+1", "1@9+1 2@5+1", "1@10+1 2@6+1", "1@11+1 2@7+1", "1@12+1",
              "1@13+1", "1@14+1", "1@15+1", "preempted 2; 1@16+1"}},
        // In step 20 it is 2's turn, all 5 pages are taken and 2 would need another.
        Case{"WhoCannotHaveAPageLeavesItsTurnToTheFirst",
             1,
             1,
             8,
             5,
             {{1, 1, 0, 4, 16}, {1, 2, 0, 6, 16}},
             {"admitted 1; 1@0+1",
              "1@1+1",
              "1@2+1",
              "admitted 2; 2@0+1",
              "1@3+1",
              "2@1+1",
              "1@4+1",
              "2@2+1",
              "1@5+1",
              "2@3+1",
              "1@6+1",
              "2@4+1",
              "1@7+1",
              "2@5+1",
              "1@8+1",
              "2@6+1",
              "1@9+1",
              "2@7+1",
              "1@10+1",
              "1@11+1",
              "preempted 2; 1@12+1",
              "1@13+1",
              "1@14+1",
              "admitted 2; 2@0+1"}},
        Case{"DeadlinesEndTheQueuedAndTheRunning",
             8,
             4,
             1,
             100,
             {{1, 1, 0, 4, 50, 3}, {1, 2, 0, 4, 50, 2}, {1, 3, 0, 4, 50, 9}},
             {"admitted 1; 1@0+4", "expired 2; 1@4+1", "expired 1; admitted 3; 3@0+4"}}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Scheduler, RefusesWhatCanNeverFitWithTheNumbers) {
  // Pages of 16 tokens: 4,096 bytes full and 1,024 bytes window; 5 slots. One superblock is 4,096.
  const CacheShape shape{.page_tokens = 16,
                         .paged_page_bytes = 4096,
                         .ring_page_bytes = 1024,
                         .window = 64,
                         .ring_slots = 5};
  SchedulerPlay play({}, {shape, 4096, 13});
  const absl::Status status = play.Add(1, 0, 100, 192);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "can never fit: 192 tokens need 12 paged + 5 ring pages = 54272 bytes in 14 "
            "superblocks, the cache holds 53248 bytes in 13 superblocks");
  EXPECT_TRUE(play.Add(1, 0, 100, 176).ok());  // 11 pages and 2 superblocks of ring
  EXPECT_EQ(play.scheduler.queued(), 1);
}

TEST(Scheduler, RefusesBeyondTheQueueLimitsWithTheNumbers) {
  SchedulerPlay play({.max_queued_requests = 2, .max_queued_tokens = 100}, PlainPages(1000));
  ASSERT_TRUE(play.Add(1, 0, 60, 70).ok());
  const absl::Status tokens = play.Add(2, 0, 41, 50);
  EXPECT_EQ(tokens.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(tokens.message(), "queue is full: 60 tokens wait, 41 more exceed the limit of 100");
  ASSERT_TRUE(play.Add(2, 0, 40, 50).ok());
  const absl::Status requests = play.Add(3, 0, 1, 2);
  EXPECT_EQ(requests.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(requests.message(), "queue is full: 2 requests wait, the limit is 2");
  EXPECT_EQ(play.scheduler.queued_tokens(), 100);
  play.Step();
  EXPECT_EQ(play.scheduler.queued_tokens(), 0);
  EXPECT_TRUE(play.Add(3, 0, 1, 2).ok());
}

TEST(Scheduler, ForgetsWhatIsRemovedQueuedOrRunning) {
  SchedulerPlay play({.max_running = 1}, PlainPages(1000));
  ASSERT_TRUE(play.Add(1, 0, 4, 9).ok());
  ASSERT_TRUE(play.Add(2, 0, 4, 9, absl::FromUnixSeconds(5)).ok());
  const Batch batch = play.Step(0);
  play.scheduler.Remove(1);
  play.scheduler.Remove(2);
  play.scheduler.Remove(2);
  EXPECT_TRUE(play.scheduler.idle());
  EXPECT_EQ(play.scheduler.queued_tokens(), 0);
  EXPECT_FALSE(play.scheduler.Find(1).has_value());
  play.scheduler.Commit(batch.items[0], 1);  // came too late: ignored
  EXPECT_EQ(ToText(play.Step(9)), "");
}

TEST(Scheduler, GivesTheSameBatchesForTheSameCalls) {
  const auto run = [] {
    SchedulerPlay play({.max_batched_tokens = 16, .max_running = 4}, PlainPages(12));
    std::string log;
    for (Ticket t = 1; t <= 40; ++t) EXPECT_TRUE(play.Add(t, t % 3, 1 + t % 17, 20 + t % 9).ok());
    for (int i = 0; i < 400; ++i) absl::StrAppend(&log, ToText(play.Step()), "\n");
    return log;
  };
  EXPECT_EQ(run(), run());
}

TEST(Scheduler, NeverStarvesDecodeForPrefillNorTheReverse) {
  for (int budget : {1, 2, 3, 8, 64}) {
    SchedulerPlay play({.max_batched_tokens = budget, .max_running = 40}, PlainPages(1 << 20));
    Ticket next = 1;
    for (; next <= 30; ++next) ASSERT_TRUE(play.Add(next, 0, 1, 1 << 20).ok());
    std::map<Ticket, int> last_served;
    int last_prefill = 0, steps_with_both = 0;
    for (int step = 1; step <= 3000; ++step) {
      // A long prompt always waits.
      if (play.scheduler.queued() == 0) {
        ASSERT_TRUE(play.Add(next++, 0, 500, 501).ok());
      }
      const Batch batch = play.Step();
      ASSERT_LE(batch.tokens(), budget);
      bool prefill = false, decode = false;
      for (const BatchItem& item : batch.items) {
        (item.ticket > 30 ? prefill : decode) = true;
        last_served[item.ticket] = step;
      }
      if (prefill) last_prefill = step;
      steps_with_both += prefill && decode;
      if (step < 200) continue;  // until all 30 have been admitted
      for (Ticket t = 1; t <= 30; ++t) {
        // 30 decodes and at most 10 prompts' last tokens over at least half the budget.
        ASSERT_LE(step - last_served[t], 2 * 40 / std::max(1, budget / 2) + 2)
            << "budget " << budget;
      }
      ASSERT_LE(step - last_prefill, 2) << "budget " << budget;
    }
    if (budget > 1) {
      EXPECT_GT(steps_with_both, 2500) << "budget " << budget;
    }
  }
}

TEST(Scheduler, DecidesInMicrosecondsWith64RunningAnd10000Queued) {
  SchedulerPlay play({.max_batched_tokens = 512,
                      .max_running = 64,
                      .max_queued_requests = 20000,
                      .max_queued_tokens = int64_t{1} << 40},
                     PlainPages(1 << 20));
  for (Ticket t = 1; t <= 10064; ++t) {
    ASSERT_TRUE(play.Add(t, t % 3, 100, 2000, absl::FromUnixSeconds(1000000 + t)).ok());
  }
  for (int i = 0; i < 30; ++i) play.Step();
  ASSERT_EQ(play.scheduler.running(), 64);
  std::vector<double> microseconds;
  for (int i = 0; i < 501; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    play.Step();  // Next and 64 Commits
    microseconds.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
            .count());
  }
  std::nth_element(microseconds.begin(), microseconds.begin() + 250, microseconds.end());
  RecordProperty("median_us", std::to_string(microseconds[250]));
  // Measured 6 us in an optimised build; the bound leaves room for debug and sanitizer builds.
  EXPECT_LT(microseconds[250], 1000);
}

}  // namespace
}  // namespace longspan
