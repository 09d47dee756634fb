#include "engine/scheduler.h"
#include "gtest/gtest.h"

namespace longspan {
namespace {

// One kind of page of 256 bytes for 16 tokens; `pages` of them.
CacheNumbers Pages(int pages) {
  CacheNumbers numbers;
  numbers.shape.page_tokens = 16;
  numbers.shape.paged_page_bytes = 256;
  numbers.superblock_bytes = 256;
  numbers.superblocks = pages;
  return numbers;
}

SequenceState Forked(Ticket ticket, uint64_t arrival) {
  SequenceState state;
  state.ticket = ticket;
  state.arrival = arrival;
  state.tokens = 17;
  state.computed = 16;
  state.max_tokens = 40;
  return state;
}

TEST(SchedulerFork, GoesOnWithItsNextTokenAtOnce) {
  Scheduler scheduler(SchedulerLimits(), Pages(100));
  ASSERT_TRUE(scheduler.AddRunning(Forked(7, 1)));
  const Batch batch = scheduler.Next(absl::UnixEpoch());
  ASSERT_EQ(batch.items.size(), 1u);
  EXPECT_TRUE(batch.admitted.empty());
  EXPECT_EQ(batch.items[0].ticket, 7u);
  EXPECT_EQ(batch.items[0].begin, 16);
  EXPECT_EQ(batch.items[0].count, 1);
}

TEST(SchedulerFork, NeedsRoomThatNobodyHolds) {
  SchedulerLimits limits;
  limits.max_running = 1;
  Scheduler one(limits, Pages(100));
  EXPECT_TRUE(one.AddRunning(Forked(1, 1)));
  EXPECT_FALSE(one.AddRunning(Forked(2, 1)));
  // 17 tokens and a page of growth are 3 pages.
  Scheduler small(SchedulerLimits(), Pages(5));
  EXPECT_TRUE(small.AddRunning(Forked(1, 1)));
  EXPECT_FALSE(small.AddRunning(Forked(2, 1)));
  EXPECT_FALSE(small.Find(2).has_value());
  EXPECT_EQ(small.running(), 1);
}

TEST(SchedulerFork, OvertakesNobodyWhoWaits) {
  Scheduler scheduler(SchedulerLimits(), Pages(100));
  SequenceState waiting = Forked(1, 5);
  ASSERT_TRUE(scheduler.Add(waiting).ok());
  EXPECT_FALSE(scheduler.AddRunning(Forked(2, 6)));
  EXPECT_TRUE(scheduler.AddRunning(Forked(3, 4)));
}

}  // namespace
}  // namespace longspan
