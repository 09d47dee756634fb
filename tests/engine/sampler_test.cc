#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"
#include "kernels/row_math.h"

namespace longspan {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<float> RandomRow(int vocab, unsigned seed, float spread = 3) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> row(vocab);
  for (float& x : row) x = normal(random);
  return row;
}

struct Knobs {
  SamplingParams params;
  const TokenHistory* history = nullptr;
  std::vector<int32_t> banned;
};

// What the knobs leave of the distribution, in double precision and by full sorts, straight from
// their definitions.
std::vector<double> Reference(const std::vector<float>& row, const Knobs& knobs) {
  const SamplingParams& p = knobs.params;
  const int vocab = static_cast<int>(row.size());
  std::vector<double> logits(row.begin(), row.end());
  for (double& x : logits) x = std::isfinite(x) ? x : -kInfinity;
  for (const auto& [id, bias] : p.logit_bias) logits[id] += bias;
  for (int i = 0; knobs.history != nullptr && i < vocab; ++i) {
    const int count = knobs.history->output_count[i];
    if (knobs.history->in_prompt[i] || count > 0) {
      const double r = p.repetition_penalty;
      logits[i] = logits[i] > 0 ? logits[i] / r : logits[i] * r;
    }
    logits[i] -= p.frequency_penalty * count + (count > 0 ? p.presence_penalty : 0.0);
  }
  for (int id : knobs.banned) logits[id] = -kInfinity;
  const double highest = *std::max_element(logits.begin(), logits.end());
  std::vector<double> weight(vocab);
  for (int i = 0; i < vocab; ++i) weight[i] = std::exp((logits[i] - highest) / p.temperature);
  for (double& w : weight) w = w >= p.min_p ? w : 0;
  std::vector<int> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  if (p.top_k > 0 && p.top_k < vocab) {
    const double last = logits[order[p.top_k - 1]];
    for (int i = 0; i < vocab; ++i) weight[i] = logits[i] >= last ? weight[i] : 0;
  }
  const double total = std::accumulate(weight.begin(), weight.end(), 0.0);
  double before = 0;
  for (int id : order) {
    const double w = weight[id];
    if (p.top_p < 1 && before >= static_cast<double>(p.top_p) * total) weight[id] = 0;
    before += w;
  }
  const double kept = std::accumulate(weight.begin(), weight.end(), 0.0);
  for (double& w : weight) w /= kept;
  return weight;
}

// Draws tokens with the CPU's op.
class Sampler {
 public:
  int32_t Draw(const std::vector<float>& row, const DrawInput& input) {
    list_.Clear();
    list_.Add(input);
    int32_t token = -1;
    const View logits = View::Matrix(const_cast<float*>(row.data()), DType::kF32, 1,
                                     static_cast<int64_t>(row.size()));
    backend_->Run(backend_->ops().Sample, {.logits = logits,
                                           .draws = list_.draws.data(),
                                           .edits = list_.edits.data(),
                                           .tokens = View::Vector(&token, DType::kI32, 1)});
    return token;
  }

 private:
  std::unique_ptr<Backend> backend_ = Backend::Cpu({.threads = 1});
  DrawList list_;
};

int32_t Draw(Sampler& sampler, const std::vector<float>& row, const Knobs& knobs,
             int64_t position = 0, uint64_t seed = 1, int choice = 0) {
  DrawInput input;
  input.params = &knobs.params;
  input.seed = seed;
  input.choice = choice;
  input.position = position;
  input.history = knobs.history;
  input.banned = knobs.banned;
  return sampler.Draw(row, input);
}

std::map<int32_t, int> Frequencies(const std::vector<float>& row, const Knobs& knobs, int draws) {
  Sampler sampler;
  std::map<int32_t, int> seen;
  for (int i = 0; i < draws; ++i) ++seen[Draw(sampler, row, knobs, i)];
  return seen;
}

// Draws 20,000 tokens: none outside the reference's support, and a chi-square over the tokens with
// at least 5 expected draws (the rest pooled) below its mean plus 6 standard deviations, sqrt(2
// df). Seeds are fixed, so this never flickers; a wrong weight of a few percent on a likely token
// exceeds it.
void ExpectDistribution(const std::vector<float>& row, const Knobs& knobs) {
  constexpr int kDraws = 20000;
  const std::vector<double> expected = Reference(row, knobs);
  double chi_square = 0, pooled_expected = 0, pooled_seen = 0;
  int degrees = 0;
  std::map<int32_t, int> seen = Frequencies(row, knobs, kDraws);
  for (size_t i = 0; i < row.size(); ++i) {
    const double e = expected[i] * kDraws;
    const double n = seen[static_cast<int32_t>(i)];
    if (e == 0) {
      ASSERT_EQ(n, 0) << "token " << i << " was cut";
    } else if (e < 5) {
      pooled_expected += e;
      pooled_seen += n;
    } else {
      chi_square += (n - e) * (n - e) / e;
      ++degrees;
    }
  }
  if (pooled_expected >= 5) {
    chi_square += std::pow(pooled_seen - pooled_expected, 2) / pooled_expected;
    ++degrees;
  }
  EXPECT_LT(chi_square, degrees + 6 * std::sqrt(2.0 * degrees) + 1e-9);
}

std::vector<int32_t> Support(const std::vector<float>& row, const Knobs& knobs, int draws = 4000) {
  std::vector<int32_t> tokens;
  for (const auto& [token, count] : Frequencies(row, knobs, draws)) tokens.push_back(token);
  return tokens;
}

TEST(Sampler, GreedyTakesTheSmallestIdOfTheLargestLogit) {
  Knobs knobs;
  knobs.params.temperature = 0;
  Sampler sampler;
  EXPECT_EQ(Draw(sampler, {1, 5, 2, 5, 5}, knobs), 1);
  for (int vocab : {1, 2, 63, 64, 65, 127, 1000}) {
    const std::vector<float> row = RandomRow(vocab, vocab);
    const auto best = std::max_element(row.begin(), row.end()) - row.begin();
    EXPECT_EQ(Draw(sampler, row, knobs), best) << vocab;
  }
}

TEST(Sampler, DrawsFromTheSoftmaxAtEveryTemperature) {
  for (float temperature : {0.3f, 1.0f, 1.7f}) {
    Knobs knobs;
    knobs.params.temperature = temperature;
    ExpectDistribution(RandomRow(200, 3), knobs);
  }
}

TEST(Sampler, EveryKnobLeavesItsOwnDistribution) {
  TokenHistory history(300);
  for (int token : {3, 7, 7, 250}) history.AddPrompt(token);
  for (int token : {7, 9, 9, 9, 120}) history.AddOutput(token);
  std::vector<Knobs> all(9);
  all[0].params.top_k = 5;
  all[1].params.top_p = 0.7f;
  all[2].params.min_p = 0.05f;
  all[3].params.presence_penalty = 1.5f;
  all[4].params.frequency_penalty = -0.7f;
  all[5].params.repetition_penalty = 1.4f;
  all[6].params.logit_bias = {{3, 5.0f}, {4, -100.0f}, {299, 7.5f}};
  all[7].banned = {1, 2, 3, 4, 5};
  SamplingParams& everything = all[8].params;
  everything.temperature = 0.8f;
  everything.top_k = 40;
  everything.top_p = 0.9f;
  everything.min_p = 0.01f;
  everything.presence_penalty = 0.5f;
  everything.frequency_penalty = 0.25f;
  everything.repetition_penalty = 1.2f;
  everything.logit_bias = {{10, 2.0f}};
  for (int i : {3, 4, 5, 8}) all[i].history = &history;
  for (size_t i = 0; i < all.size(); ++i) {
    SCOPED_TRACE(i);
    ExpectDistribution(RandomRow(300, 11 + static_cast<unsigned>(i)), all[i]);
  }
}

TEST(Sampler, RandomKnobsKeepExactlyTheReferencesSupport) {
  std::mt19937 random(5);
  auto uniform = [&] { return std::uniform_real_distribution<float>(0, 1)(random); };
  Sampler sampler;
  for (int trial = 0; trial < 200; ++trial) {
    const int vocab = 2 + static_cast<int>(random() % 12000);
    const std::vector<float> row = RandomRow(vocab, random(), 0.5f + 4 * uniform());
    Knobs knobs;
    knobs.params.temperature = 0.2f + 2 * uniform();
    if (random() % 2 == 0) knobs.params.top_k = 1 + static_cast<int>(random() % vocab);
    if (random() % 2 == 0) knobs.params.top_p = 0.05f + 0.9f * uniform();
    if (random() % 2 == 0) knobs.params.min_p = 0.3f * uniform();
    const std::vector<double> expected = Reference(row, knobs);
    for (int i = 0; i < 50; ++i) {
      const int32_t token = Draw(sampler, row, knobs, i, trial);
      ASSERT_GT(expected[token], 0) << "trial " << trial;
    }
  }
}

TEST(Sampler, TopKKeepsExactlyKAndTheTiesAtItsBorder) {
  Knobs knobs;
  knobs.params.top_k = 2;
  EXPECT_THAT(Support({0, 3, 1, 2.5f}, knobs), testing::ElementsAre(1, 3));
  EXPECT_THAT(Support({2, 3, 2, 1}, knobs), testing::ElementsAre(0, 1, 2));
  knobs.params.top_k = 1;
  EXPECT_THAT(Support(RandomRow(500, 2), knobs), testing::SizeIs(1));
  knobs.params.top_k = 4;
  EXPECT_THAT(Support({1, 1, 1, 1}, knobs), testing::SizeIs(4));
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesP) {
  // Probabilities 1/2, 1/4, 1/8, 1/8.
  const float step = std::log(2.0f);
  const std::vector<float> row = {0, -step, -2 * step, -2 * step};
  Knobs knobs;
  knobs.params.top_p = 0.4f;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0));
  knobs.params.top_p = 0.51f;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0, 1));
  knobs.params.top_p = 0.76f;  // of the tied pair the smaller id is enough
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0, 1, 2));
  knobs.params.top_p = 0.9f;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0, 1, 2, 3));
  knobs.params.top_p = 1e-9f;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0));
  knobs.params.top_p = 0.5f;
  EXPECT_THAT(Support(std::vector<float>(100, 1.0f), knobs), testing::SizeIs(50));
}

TEST(Sampler, MinPIsRelativeToTheMostLikely) {
  const float step = std::log(2.0f);
  const std::vector<float> row = {0, -step, -2 * step, -3 * step};
  Knobs knobs;
  knobs.params.min_p = 0.3f;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0, 1));
  knobs.params.min_p = 0.24f;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0, 1, 2));
  knobs.params.min_p = 1;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0));
  EXPECT_THAT(Support({1, 1, 0}, knobs), testing::ElementsAre(0, 1));
}

TEST(Sampler, KnobsThatCutNothingChangeNoToken) {
  const std::vector<float> row = RandomRow(1000, 8);
  Knobs plain, open;
  open.params.top_k = 1000;
  open.params.min_p = 1e-30f;
  open.params.logit_bias = {{5, 0.0f}};
  Sampler sampler;
  for (int i = 0; i < 500; ++i) {
    ASSERT_EQ(Draw(sampler, row, plain, i), Draw(sampler, row, open, i));
  }
}

TEST(Sampler, ATokenDependsOnSeedChoiceAndPositionAndOnNothingBefore) {
  const std::vector<float> row = RandomRow(5000, 4, 0.1f);
  Knobs knobs;
  Sampler used, fresh;
  for (int i = 0; i < 100; ++i) Draw(used, RandomRow(777, i), knobs, i);
  EXPECT_EQ(Draw(used, row, knobs, 3, 9, 2), Draw(fresh, row, knobs, 3, 9, 2));
  // Each of these differs from the first in one argument; on 5,000 nearly equal tokens two agree by
  // chance once in 5,000 times.
  EXPECT_NE(Draw(fresh, row, knobs, 3, 9, 2), Draw(fresh, row, knobs, 4, 9, 2));
  EXPECT_NE(Draw(fresh, row, knobs, 3, 9, 2), Draw(fresh, row, knobs, 3, 10, 2));
  EXPECT_NE(Draw(fresh, row, knobs, 3, 9, 2), Draw(fresh, row, knobs, 3, 9, 3));
}

TEST(Sampler, UniformsFillTheUnitIntervalEvenly) {
  constexpr int kBins = 100, kDraws = 100000;
  std::vector<int> bins(kBins);
  for (int i = 0; i < kDraws; ++i) {
    const double u = UniformAt(i % 10, i / 10 % 10, i / 100);
    ASSERT_GE(u, 0);
    ASSERT_LT(u, 1);
    ++bins[static_cast<int>(u * kBins)];
  }
  double chi_square = 0;
  for (int n : bins) chi_square += std::pow(n - kDraws / kBins, 2) / (kDraws / kBins);
  EXPECT_LT(chi_square, 99 + 6 * std::sqrt(2.0 * 99));
}

TEST(Sampler, NonFiniteLogitsAreNeverChosen) {
  std::vector<float> row = {kNaN, 1, kInfinity, 2, -kInfinity, 0};
  Knobs knobs;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(1, 3, 5));
  knobs.params.top_p = 0.999f;
  knobs.params.top_k = 5;
  knobs.params.logit_bias = {{2, 100.0f}, {0, 100.0f}};
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(1, 3, 5));
  knobs.params.temperature = 0;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(3));
}

TEST(Sampler, PenaltiesDoNotMakeANumberOfNaN) {
  TokenHistory history(4);
  for (int token : {0, 1, 2}) history.AddOutput(token);
  Knobs knobs;
  knobs.history = &history;
  knobs.params.repetition_penalty = 0.5f;
  EXPECT_THAT(Support({kNaN, kInfinity, 1, 1}, knobs), testing::ElementsAre(2, 3));
}

TEST(Sampler, WithoutAnyFiniteLogitTheSmallestAllowedIdIsTaken) {
  Knobs knobs;
  Sampler sampler;
  const std::vector<float> row = {kNaN, -kInfinity, kInfinity, kNaN};
  EXPECT_EQ(Draw(sampler, row, knobs), 0);
  knobs.banned = {0, 1};
  EXPECT_EQ(Draw(sampler, row, knobs), 2);
}

TEST(Sampler, ExtremeTemperaturesAreHarmless) {
  const std::vector<float> row = {1, 3, 3, -1e30f};
  Knobs knobs;
  for (float tiny : {1e-45f, 1e-30f, 1e-6f}) {
    knobs.params.temperature = tiny;
    EXPECT_THAT(Support(row, knobs), testing::ElementsAre(1, 2)) << tiny;
    knobs.params.top_p = 0.9f;
    EXPECT_THAT(Support(row, knobs), testing::ElementsAre(1, 2)) << tiny;
    knobs.params.top_p = 1;
  }
  knobs.params.temperature = 100;
  EXPECT_THAT(Support(row, knobs), testing::ElementsAre(0, 1, 2));
}

TEST(Sampler, PenaltyArithmeticIsExact) {
  TokenHistory history(4);
  history.AddPrompt(0);
  history.AddOutput(1);
  history.AddOutput(1);
  history.AddOutput(2);
  Knobs knobs;
  knobs.history = &history;
  knobs.params.temperature = 0;
  Sampler sampler;
  // Repetition 2 halves a positive logit and doubles a negative one, in prompt and output.
  knobs.params.repetition_penalty = 2;
  EXPECT_EQ(Draw(sampler, {4, 4, 4, 2.25f}, knobs), 3);
  EXPECT_EQ(Draw(sampler, {4, 4, 4, 1.75f}, knobs), 0);
  EXPECT_EQ(Draw(sampler, {-1, -1, -1, -1.75f}, knobs), 3);
  knobs.params.repetition_penalty = 1;
  // Frequency counts the output alone: token 1 loses 2, token 2 loses 1, the prompt's token
  // nothing.
  knobs.params.frequency_penalty = 1;
  EXPECT_EQ(Draw(sampler, {0, 2.5f, 1.25f, 0}, knobs), 1);
  EXPECT_EQ(Draw(sampler, {0, 2.0f, 1.25f, 0}, knobs), 2);
  EXPECT_EQ(Draw(sampler, {0.5f, 2.0f, 1.25f, 0}, knobs), 0);
  knobs.params.frequency_penalty = 0;
  // Presence takes the same from any count.
  knobs.params.presence_penalty = 1;
  EXPECT_EQ(Draw(sampler, {0, 1.5f, 1.25f, 0}, knobs), 1);
  EXPECT_EQ(Draw(sampler, {0.75f, 1.5f, 1.25f, 0}, knobs), 0);
}

// Once where the border is among the most likely few thousand, once where it is far beyond them.
TEST(Sampler, LargeVocabulariesKeepTheReferencesSupport) {
  Sampler sampler;
  for (float spread : {4.0f, 0.5f}) {
    const std::vector<float> row = RandomRow(262144, 21, spread);
    Knobs knobs;
    knobs.params.top_p = 0.5f;
    const std::vector<double> expected = Reference(row, knobs);
    for (int i = 0; i < 100; ++i) ASSERT_GT(expected[Draw(sampler, row, knobs, i)], 0);
  }
}

// log softmax in double precision; 1e-5 covers the fp32 weights' relative error of 3e-7 in a sum of
// positive terms and rounding a result of about 10 to float.
TEST(Logprobs, EqualAnIndependentLogSoftmax) {
  for (int vocab : {1, 5, 64, 1000, 50000}) {
    const std::vector<float> row = RandomRow(vocab, vocab);
    double sum = 0;
    for (float x : row) sum += std::exp(static_cast<double>(x));
    std::vector<int> order(vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
    const int top = std::min(20, vocab);
    for (int rank : {1, vocab / 2 + 1, vocab}) {
      const TokenLogprob got = LogprobOf(row, order[rank - 1], top);
      EXPECT_EQ(got.rank, rank);
      EXPECT_NEAR(got.logprob, row[order[rank - 1]] - std::log(sum), 1e-5);
      ASSERT_EQ(static_cast<int>(got.top.size()), top);
      for (int i = 0; i < top; ++i) {
        EXPECT_EQ(got.top[i].token, order[i]);
        EXPECT_EQ(got.top[i].rank, i + 1);
        EXPECT_NEAR(got.top[i].logprob, row[order[i]] - std::log(sum), 1e-5);
      }
    }
  }
}

TEST(Logprobs, TiesRankByIdAndImpossibleTokensStayOutOfTheTop) {
  const std::vector<float> row = {2, kNaN, 2, -kInfinity, 2};
  const TokenLogprob got = LogprobOf(row, 4, 20);
  EXPECT_EQ(got.rank, 3);
  EXPECT_NEAR(got.logprob, -std::log(3.0), 1e-6);
  ASSERT_EQ(got.top.size(), 3u);
  EXPECT_EQ(got.top[0].token, 0);
  EXPECT_EQ(got.top[2].token, 4);
  EXPECT_EQ(LogprobOf(row, 3, 0).logprob, -kInfinity);
}

// Log-probabilities are of the raw distribution, so that whoever reads the row after the draw must
// find it as it was.
TEST(Sampler, LeavesTheLogitsAsTheyWere) {
  const std::vector<float> row = RandomRow(100, 6), before = row;
  TokenHistory history(100);
  history.AddOutput(3);
  Knobs knobs;
  knobs.params.temperature = 0.1f;
  knobs.params.top_k = 3;
  knobs.params.logit_bias = {{7, 50.0f}};
  knobs.params.presence_penalty = 1;
  knobs.history = &history;
  knobs.banned = {8};
  Sampler sampler;
  EXPECT_EQ(Draw(sampler, row, knobs), 7);
  EXPECT_EQ(row, before);
}

TEST(RowMath, WeightsMatchExpWithinTheirTolerance) {
  float x[kRowBlock], w[kRowBlock];
  for (int i = 0; i < kRowBlock; ++i) x[i] = -static_cast<float>(i) * 1.03f;
  BlockWeights(x, 0, 1, kNoLogit, w);
  for (int i = 0; i < kRowBlock; ++i) {
    const double exact = std::exp(static_cast<double>(x[i]));
    EXPECT_NEAR(w[i] / exact, 1, 3e-7) << x[i];
  }
}

}  // namespace
}  // namespace longspan
