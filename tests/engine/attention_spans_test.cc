#include "engine/attention_spans.h"

#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace longspan {
namespace {

// Two layers: a window of 8, then full attention; three and two heads.
ModelSpec Hybrid() {
  ModelSpec spec;
  AttentionSpec sliding;
  sliding.heads = 3;
  sliding.window = 8;
  AttentionSpec full;
  full.heads = 2;
  spec.layers.resize(2);
  spec.layers[0].mixer = sliding;
  spec.layers[1].mixer = full;
  return spec;
}

std::vector<SpanRecord> Records(float scale = 1) {
  std::vector<SpanRecord> records(2 * 3);
  for (int i = 0; i < 5; ++i) {
    SpanRecord& r = records[i];
    r.far_mass = i < 3 ? 0 : scale * 0.25f;
    r.sink_mass = scale * 0.125f;
    r.distance = scale * static_cast<float>(i);
    r.entropy = scale * 0.5f;
    r.top_probability = scale * 0.75f;
    r.mass_by_distance[2] = scale * 0.0625f;
  }
  return records;
}

SpanRow RowOf(const std::vector<SpanRecord>& records) { return {records.data(), 3, 0}; }

std::vector<int32_t> Tokens(int count) {
  std::vector<int32_t> tokens(count);
  for (int i = 0; i < count; ++i) tokens[i] = 100 + i;
  return tokens;
}

TEST(AttentionSpans, AddUpPerLayerAndHead) {
  const ModelSpec spec = Hybrid();
  AttentionSpans spans(spec);
  const std::vector<int32_t> tokens = Tokens(40);
  spans.Add(RowOf(Records(1)), 39, tokens, 7);
  spans.Add(RowOf(Records(2)), 39, tokens, 7);
  spans.CountStep(true);
  const SpanSnapshot got = spans.Snapshot();
  EXPECT_EQ(got.observed_queries, 2u);
  EXPECT_EQ(got.sampled_steps, 1u);
  EXPECT_EQ(got.sums.layers, 2);
  EXPECT_EQ(got.sums.heads, 3);
  const HeadSums& head = got.sums.at(1, 1);  // record 4
  EXPECT_EQ(head.queries, 2);
  EXPECT_EQ(head.far_mass, 0.75);
  EXPECT_EQ(head.sink_mass, 0.375);
  EXPECT_EQ(head.sink_queries, 2);
  EXPECT_EQ(head.distance, 12);
  EXPECT_EQ(head.entropy, 1.5);
  EXPECT_EQ(head.top_probability, 2.25);
  EXPECT_EQ(head.mass_by_distance[2], 0.1875);
  EXPECT_EQ(got.sums.at(0, 0).far_mass, 0);
  EXPECT_EQ(got.sums.at(1, 2).queries, 0) << "the second layer has two heads only";
}

TEST(AttentionSpans, RecentDistanceForgetsWhatIsLongPast) {
  const ModelSpec spec = Hybrid();
  AttentionSpans spans(spec);
  const std::vector<int32_t> tokens = Tokens(40);
  const auto recent = [&] { return spans.Snapshot().recent_distance[4]; };  // distance is 4 * scale
  spans.Add(RowOf(Records(1)), 39, tokens, 7);
  EXPECT_EQ(recent(), 4) << "the first query is all there is";
  spans.Add(RowOf(Records(2)), 39, tokens, 7);
  EXPECT_DOUBLE_EQ(recent(), 4 + 4 * kRecentWeight);
  for (int i = 0; i < 1000; ++i) spans.Add(RowOf(Records(2)), 39, tokens, 7);
  EXPECT_NEAR(recent(), 8, 1e-5);  // 4 * (63/64)^1001 is below 6e-7
  spans.Reset();
  EXPECT_EQ(recent(), 0);
}

TEST(AttentionSpans, SinkMassCountsOnlyWhereTheWindowIsPastTheSinks) {
  const ModelSpec spec = Hybrid();
  SpanSums sums = EmptySums(spec);
  const int first = kSinkTokens + 8;
  AddRow(spec, RowOf(Records()), first - 1, Tokens(first), 7, sums);
  EXPECT_EQ(sums.at(1, 0).sink_queries, 0);
  EXPECT_EQ(sums.at(1, 0).sink_mass, 0);
  AddRow(spec, RowOf(Records()), first, Tokens(first + 1), 7, sums);
  EXPECT_EQ(sums.at(1, 0).sink_queries, 1);
  EXPECT_EQ(sums.at(1, 0).sink_mass, 0.125);
  EXPECT_EQ(sums.at(1, 0).queries, 2);
}

TEST(AttentionSpans, ACopyHitIsTheGeneratedTokenBeyondTheWindow) {
  const ModelSpec spec = Hybrid();
  const std::vector<int32_t> tokens = Tokens(40);
  auto hits = [&](int top_key, int32_t next) {
    SpanSums sums = EmptySums(spec);
    std::vector<SpanRecord> records = Records();
    records[3].top_key = top_key;
    AddRow(spec, RowOf(records), 39, tokens, next, sums);
    return sums.at(1, 0).copy_hits;
  };
  EXPECT_EQ(hits(31, 131), 1) << "distance 8 is beyond a window of 8";
  EXPECT_EQ(hits(32, 132), 0) << "distance 7 is inside";
  EXPECT_EQ(hits(31, 130), 0) << "another token was generated";
}

TEST(AttentionSpans, AModelWithoutWindowsHasNoCopyHits) {
  ModelSpec spec = Hybrid();
  std::get<AttentionSpec>(spec.layers[0].mixer).window.reset();
  SpanSums sums = EmptySums(spec);
  AddRow(spec, RowOf(Records()), 39, Tokens(40), 100, sums);  // every top_key is 0
  EXPECT_EQ(sums.at(1, 0).copy_hits, 0);
}

TEST(AttentionSpansDeathTest, MassBeyondAWindowIsABug) {
  const ModelSpec spec = Hybrid();
  SpanSums sums = EmptySums(spec);
  std::vector<SpanRecord> records = Records();
  records[1].beyond_window = 1e-30f;
  EXPECT_DEATH(AddRow(spec, RowOf(records), 39, Tokens(40), 7, sums), "beyond_window");
}

TEST(AttentionSpans, ResetForgetsTheSumsButNotTheSequenceNumber) {
  const ModelSpec spec = Hybrid();
  AttentionSpans spans(spec);
  spans.Add(RowOf(Records()), 39, Tokens(40), 7);
  spans.CountStep(true);
  spans.CountStep(false);
  spans.CountRequest();
  EXPECT_EQ(spans.Snapshot().dropped_steps, 1u);
  EXPECT_EQ(spans.Snapshot().observed_requests, 1u);
  spans.Reset();
  const SpanSnapshot got = spans.Snapshot();
  EXPECT_EQ(got.observed_queries, 0u);
  EXPECT_EQ(got.observed_requests, 0u);
  EXPECT_EQ(got.sums.at(0, 0).queries, 0);
  EXPECT_EQ(got.sequence, 1u);
}

TEST(AttentionSpans, ASnapshotNeverSeesHalfARow) {
  const ModelSpec spec = Hybrid();
  AttentionSpans spans(spec);
  std::thread writer([&] {
    const std::vector<int32_t> tokens = Tokens(40);
    for (int i = 0; i < 2000; ++i) spans.Add(RowOf(Records()), 39, tokens, 7);
  });
  for (int i = 0; i < 200; ++i) {
    const SpanSnapshot got = spans.Snapshot();
    ASSERT_EQ(got.sums.at(0, 0).queries, got.sums.at(1, 1).queries);
    ASSERT_EQ(static_cast<double>(got.observed_queries), got.sums.at(0, 0).queries);
  }
  writer.join();
}

}  // namespace
}  // namespace longspan
