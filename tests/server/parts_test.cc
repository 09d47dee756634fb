// Small parts of the server by themselves: log lines, the watchdog, percentiles, metrics.
#include <atomic>
#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/log.h"
#include "server/metric_page.h"
#include "server/metrics.h"
#include "server/span_proto.h"
#include "server/stall_watchdog.h"
#include "server/trace_parent.h"

namespace longspan {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Log, QuotesValuesThatWouldBreakTheLine) {
  const std::string line = LogLine(LogFormat::kText, LogLevel::kInfo, "ready",
                                   {{"model", "a b"}, {"id", "x\ny\"="}, {"n", 3}});
  EXPECT_THAT(line, EndsWith(" INFO ready model=\"a b\" id=\"x\\ny\\\"=\" n=3\n"));
  EXPECT_EQ(line.find('\n'), line.size() - 1);
}

TEST(Log, IsOneJsonObjectALineWhateverTheValuesHold) {
  const std::string line = LogLine(
      LogFormat::kJson, LogLevel::kWarning, "request ended",
      {{"id", "x\ny\"=\xff\u2028"}, {"tokens", int64_t{1} << 40}, {"s", LogValue::Seconds(0.25)}});
  EXPECT_EQ(line.find('\n'), line.size() - 1);
  const auto json = nlohmann::json::parse(line);
  EXPECT_EQ(json["level"], "warning");
  EXPECT_EQ(json["event"], "request ended");
  EXPECT_EQ(json["id"], "x\ny\"=\uFFFD\u2028");
  EXPECT_EQ(json["tokens"], int64_t{1} << 40);
  EXPECT_EQ(json["s"], 0.25);
  EXPECT_EQ(json["time"].get<std::string>().size(), strlen("2026-11-24T01:02:03.004Z"));
}

TEST(Log, KnowsItsLevelsAndFormats) {
  EXPECT_TRUE(SetLogLevel("warning"));
  EXPECT_FALSE(SetLogLevel("loud"));
  EXPECT_TRUE(SetLogFormat("text"));
  EXPECT_FALSE(SetLogFormat("xml"));
}

// The first is the example of the W3C recommendation; the others break one of its rules each.
TEST(TraceParent, FollowsTheRecommendation) {
  const std::string good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
  EXPECT_TRUE(IsTraceParent(good));
  EXPECT_TRUE(IsTraceParent("cc" + good.substr(2) + "-more"));
  EXPECT_FALSE(IsTraceParent("ff" + good.substr(2)));
  EXPECT_FALSE(IsTraceParent(good + "-more"));
  EXPECT_FALSE(IsTraceParent("cc" + good.substr(2) + ".more"));
  EXPECT_FALSE(IsTraceParent(good.substr(0, 54)));
  EXPECT_FALSE(IsTraceParent("00-4BF92F3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
  EXPECT_FALSE(IsTraceParent("00-00000000000000000000000000000000-00f067aa0ba902b7-01"));
  EXPECT_FALSE(IsTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"));
  EXPECT_FALSE(IsTraceParent("00_4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"));
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

TEST(Metrics, CountsRefusalsByTheirReason) {
  Metrics metrics("model", 1024, /*vllm_aliases=*/false);
  metrics.CountRefusal(absl::OkStatus());
  metrics.CountRefusal(absl::InvalidArgumentError("no reason"));
  metrics.CountRefusal(WithReason(absl::InvalidArgumentError("x"), "CONTEXT_LENGTH_EXCEEDED"));
  for (int i = 0; i < 2; ++i) {
    metrics.CountRefusal(WithReason(absl::ResourceExhaustedError("x"), "KEY_LIMIT"));
  }
  const std::string page = metrics.Page();
  EXPECT_THAT(page, HasSubstr("longspan_refusals_total{reason=\"key_limit\"} 2\n"));
  EXPECT_THAT(page, HasSubstr("longspan_refusals_total{reason=\"queue_full\"} 0\n"));
  EXPECT_THAT(page, HasSubstr("longspan_refusals_total{reason=\"never_fits\"} 0\n"));
}

TEST(Metrics, TokenBucketsReachAsFarAsTheContext) {
  const std::string page = Metrics("model", 131072, /*vllm_aliases=*/false).Page();
  EXPECT_THAT(page, HasSubstr("longspan_request_prompt_tokens_bucket{le=\"200000\"}"));
  EXPECT_THAT(page, Not(HasSubstr("longspan_request_prompt_tokens_bucket{le=\"500000\"}")));
}

TEST(MetricPage, KeepsASeriesOfOneNameTogether) {
  MetricPage page;
  page.Counter("a_total", "A.", 1, {{"x", "1"}});
  page.Gauge("b", "B.", 2);
  page.Counter("a_total", "A.", 3, {{"x", "2"}});
  EXPECT_EQ(page.Text(),
            "# HELP a_total A.\n# TYPE a_total counter\na_total{x=\"1\"} 1\na_total{x=\"2\"} 3\n"
            "# HELP b B.\n# TYPE b gauge\nb 2\n");
}

TEST(MetricPage, HistogramBucketsAreCumulative) {
  MetricPage page;
  page.Histogram("h", "H.", {1, 2, INFINITY}, {5, 0, 7}, 30);
  EXPECT_EQ(page.Text(),
            "# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 5\nh_bucket{le=\"2\"} 5\n"
            "h_bucket{le=\"+Inf\"} 12\nh_count 12\nh_sum 30\n");
}

TEST(MetricPage, EscapesLabelsAndKeepsEveryDigit) {
  MetricPage page;
  page.Gauge("g", "G.", 0.1 + 0.2, {{"x", "a\"b\\c\nd"}});
  page.Gauge("g", "", 1e300);
  page.Gauge("g", "", NAN);
  EXPECT_EQ(page.Text(),
            "# HELP g G.\n# TYPE g gauge\ng{x=\"a\\\"b\\\\c\\nd\"} 0.30000000000000004\n"
            "g 1e+300\ng NaN\n");
}

}  // namespace
}  // namespace longspan
