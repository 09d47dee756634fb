#include "kernels/cpu/parallel.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

#include "kernels/cpu/context.h"

namespace longspan {
namespace {

TEST(ThreadTeam, RunsTheBodyOnceOnEachThread) {
  for (int threads = 1; threads <= 4; ++threads) {
    ThreadTeam team(threads);
    EXPECT_EQ(team.threads(), threads);
    std::vector<int> calls(threads);
    for (int i = 0; i < 100; ++i) team.Run([&](int thread) { ++calls[thread]; });
    EXPECT_EQ(calls, std::vector<int>(threads, 100));
  }
}

TEST(ThreadTeam, TakesTheCallerAsThreadZero) {
  ThreadTeam team(3);
  std::thread::id zero;
  team.Run([&](int thread) {
    if (thread == 0) zero = std::this_thread::get_id();
  });
  EXPECT_EQ(zero, std::this_thread::get_id());
}

TEST(ThreadTeam, CoversARangeOnceInChunksOfTheGrain) {
  for (int threads : {1, 2, 4}) {
    ThreadTeam team(threads);
    for (int64_t count : {0, 1, 6, 7, 8, 1000}) {
      std::vector<int> hits(count);
      team.For(count, 7, [&](int64_t begin, int64_t end, int thread) {
        EXPECT_LE(end - begin, 7);
        EXPECT_EQ(begin % 7, 0);
        EXPECT_TRUE(thread >= 0 && thread < threads);
        for (int64_t i = begin; i < end; ++i) ++hits[i];
      });
      EXPECT_EQ(hits, std::vector<int>(count, 1));
    }
  }
}

TEST(ThreadTeam, BeginsWithAThreadsOwnPartOfTheRange) {
  for (int threads : {2, 3, 4}) {
    ThreadTeam team(threads);
    std::vector<std::vector<int64_t>> begins(threads);
    std::atomic<int> begun{0};
    team.For(5 * 12, 5, [&](int64_t begin, int64_t, int thread) {
      begins[thread].push_back(begin);
      if (begins[thread].size() == 1) ++begun;
      while (begun < threads) std::this_thread::yield();  // nobody takes another's first chunk
    });
    for (int t = 0; t < threads; ++t) EXPECT_EQ(begins[t].front(), 5 * 12 * t / threads);
  }
}

TEST(ThreadTeam, TakesWhatALateThreadHasLeft) {
  for (int threads : {2, 3, 4}) {
    ThreadTeam team(threads);
    std::atomic<int> done{0};
    team.For(100, 1, [&](int64_t begin, int64_t, int) {
      while (begin == 0 && done < 99) std::this_thread::yield();
      ++done;
    });
    EXPECT_EQ(done, 100);
  }
}

TEST(ThreadTeam, TakesAWorkerFromTheCallersProcessorAndLeavesItFree) {
  cpu_set_t all;
  ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  if (CPU_COUNT(&all) < 2) GTEST_SKIP() << "there is one processor";
  ThreadTeam team(2);
  const int processor = sched_getcpu();
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(processor, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  team.Run([&](int thread) {  // the worker comes here, may go elsewhere, and need not
    if (thread == 0) return;
    sched_setaffinity(0, sizeof(one), &one);
    sched_setaffinity(0, sizeof(all), &all);
  });
  int found = processor;
  cpu_set_t allowed;
  team.Run([&](int thread) {
    if (thread == 0) return;
    found = sched_getcpu();
    sched_getaffinity(0, sizeof(allowed), &allowed);
  });
  EXPECT_NE(found, processor);
  EXPECT_TRUE(CPU_EQUAL(&allowed, &all));
  ASSERT_EQ(sched_setaffinity(0, sizeof(all), &all), 0);
}

// Loops close together find the workers spinning, loops far apart find them asleep, and loops at
// about the spinning time find them falling asleep: no wake-up may be lost, whatever the gap.
TEST(ThreadTeam, LosesNoLoopHoweverFarApartTheyAre) {
  ThreadTeam team(4);
  int64_t sum = 0;
  for (int i = 0; i < 2000; ++i) {
    int64_t part[4] = {};
    team.Run([&](int thread) { part[thread] = i + thread; });
    sum += std::accumulate(part, part + 4, int64_t{0});
    const auto gap = std::chrono::microseconds(i % 5 == 0 ? 100 + i % 300 : 0);
    const auto until = std::chrono::steady_clock::now() + gap;
    while (std::chrono::steady_clock::now() < until) {
    }
  }
  EXPECT_EQ(sum, int64_t{4} * 1999 * 2000 / 2 + 2000 * 6);
}

// The caller, too, sleeps while a worker is long.
TEST(ThreadTeam, WaitsForASlowWorker) {
  ThreadTeam team(3);
  for (int i = 0; i < 20; ++i) {
    int64_t done[3] = {};
    team.Run([&](int thread) {
      if (thread == 2) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      done[thread] = 1;
    });
    EXPECT_EQ(done[0] + done[1] + done[2], 3);
  }
}

TEST(ThreadTeam, ComesAndGoesWithoutALoop) {
  for (int i = 0; i < 50; ++i) ThreadTeam team(1 + i % 4);
}

TEST(BackendContext, GrowsScratchAndKeepsItAligned) {
  cpu::BackendContext context(2, Simd::kPortable);
  std::byte* last = nullptr;
  for (size_t bytes : {1, 64, 5000, 5001, 1 << 20}) {
    for (int thread = 0; thread < 2; ++thread) {
      last = context.Scratch(thread, bytes);
      EXPECT_EQ(reinterpret_cast<uintptr_t>(last) % 64, 0u);
      for (size_t i = 0; i < bytes; ++i) last[i] = std::byte{1};
    }
  }
  EXPECT_EQ(context.Scratch(1, 100), last);  // enough is there: nothing moves
  EXPECT_NE(context.Scratch(0, 100), context.Scratch(1, 100));
  EXPECT_EQ(context.SharedScratch(10), context.SharedScratch(4000));
  EXPECT_NE(context.SharedScratch(1 << 16), nullptr);
}

TEST(BackendContext, GivesEveryThreadTheScratchThatOneNeeded) {
  cpu::BackendContext context(3, Simd::kPortable);
  const std::byte* large = context.Scratch(1, 1 << 20);
  context.Scratch(2, (1 << 20) - 1);
  for (int i = 0; i < 2; ++i) context.LevelScratch();
  EXPECT_EQ(context.Scratch(1, 1 << 20), large);
  for (int thread : {0, 2}) {
    const std::byte* small = context.Scratch(thread, 1);
    EXPECT_EQ(context.Scratch(thread, 1 << 20), small);  // nothing moves
  }
}

}  // namespace
}  // namespace longspan
