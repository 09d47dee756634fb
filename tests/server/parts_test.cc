// Small parts of the server by themselves: log lines, the watchdog, percentiles, metric pages.
#include <atomic>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/log.h"
#include "server/metric_page.h"
#include "server/span_proto.h"
#include "server/stall_watchdog.h"

namespace longspan {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

TEST(Log, QuotesValuesThatWouldBreakTheLine) {
  const std::string line =
      LogLine(LogLevel::kInfo, "ready", {{"model", "a b"}, {"id", "x\ny\"="}, {"n", "3"}});
  EXPECT_THAT(line, EndsWith(" INFO ready model=\"a b\" id=\"x\\ny\\\"=\" n=3\n"));
  EXPECT_EQ(line.find('\n'), line.size() - 1);
}

TEST(Log, KnowsItsLevels) {
  EXPECT_TRUE(SetLogLevel("warning"));
  EXPECT_FALSE(SetLogLevel("loud"));
}

TEST(StallWatchdog, FiresOnceForAWriteThatStandsAndNotForOneThatEnds) {
  StallWatchdog watchdog(absl::Milliseconds(50));
  std::atomic<int> stuck{0}, quick{0};
  const uint64_t a = watchdog.Add([&] { ++stuck; });
  const uint64_t b = watchdog.Add([&] { ++quick; });
  watchdog.WriteBegan(a);
  for (int i = 0; i < 30; ++i) {
    watchdog.WriteBegan(b);
    absl::SleepFor(absl::Milliseconds(5));
    watchdog.WriteEnded(b);
  }
  EXPECT_EQ(stuck, 1);
  EXPECT_EQ(quick, 0);
  watchdog.Remove(a);
  watchdog.Remove(b);
}

TEST(StallWatchdog, DoesNotFireAfterRemove) {
  StallWatchdog watchdog(absl::Milliseconds(20));
  std::atomic<int> fired{0};
  const uint64_t a = watchdog.Add([&] { ++fired; });
  watchdog.WriteBegan(a);
  watchdog.Remove(a);
  absl::SleepFor(absl::Milliseconds(80));
  EXPECT_EQ(fired, 0);
}

// All mass in the bucket of distances 4 to 7: the share s lies at 4 + 4 s.
TEST(Percentile, InterpolatesInsideItsBucket) {
  double mass[kDistanceBuckets] = {};
  EXPECT_EQ(Percentile(mass, 0.5), 0);
  mass[3] = 2;
  EXPECT_DOUBLE_EQ(Percentile(mass, 0.5), 6);
  EXPECT_DOUBLE_EQ(Percentile(mass, 0.25), 5);
  mass[0] = 2;
  EXPECT_DOUBLE_EQ(Percentile(mass, 0.5), 0);
  EXPECT_DOUBLE_EQ(Percentile(mass, 0.75), 6);
}

TEST(SpanDifference, IsWhatCameSinceUnlessAResetCameBetween) {
  SpanSnapshot before, now;
  before.sums.layers = now.sums.layers = 1;
  before.sums.heads = now.sums.heads = 1;
  before.sums.sums.resize(1);
  now.sums.sums.resize(1);
  before.observed_queries = 10;
  before.sums.at(0, 0).far_mass = 3;
  now.observed_queries = 14;
  now.sums.at(0, 0).far_mass = 5;
  EXPECT_EQ(Difference(now, before).observed_queries, 4u);
  EXPECT_DOUBLE_EQ(Difference(now, before).sums.at(0, 0).far_mass, 2);
  now.observed_queries = 2;
  EXPECT_EQ(Difference(now, before).observed_queries, 2u);
  EXPECT_DOUBLE_EQ(Difference(now, before).sums.at(0, 0).far_mass, 5);
}

TEST(MetricPage, KeepsASeriesOfOneNameTogether) {
  MetricPage page;
  page.Counter("a_total", "A.", 1, {{"x", "1"}});
  page.Gauge("b", "B.", 2);
  page.Counter("a_total", "A.", 3, {{"x", "2"}});
  const auto families = page.Take();
  ASSERT_EQ(families.size(), 2u);
  for (const auto& family : families) {
    EXPECT_EQ(family.metric.size(), family.name == "a_total" ? 2u : 1u);
  }
}

TEST(MetricPage, HistogramBucketsAreCumulative) {
  MetricPage page;
  page.Histogram("h", "H.", {1, 2, INFINITY}, {5, 0, 7}, 30);
  const auto histogram = page.Take()[0].metric[0].histogram;
  EXPECT_EQ(histogram.bucket[0].cumulative_count, 5u);
  EXPECT_EQ(histogram.bucket[1].cumulative_count, 5u);
  EXPECT_EQ(histogram.bucket[2].cumulative_count, 12u);
  EXPECT_EQ(histogram.sample_count, 12u);
  EXPECT_EQ(histogram.sample_sum, 30);
}

}  // namespace
}  // namespace longspan
