#include "engine/engine.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/engine_client.h"
#include "tests/support/test_device.h"
#include "tests/support/tiny_model.h"

namespace longspan {
namespace {

using testing::Client;
using testing::Complete;
using testing::CompleteTogether;
using ::testing::HasSubstr;
using testing::kTinyEos;
using testing::Outcome;
using testing::SameLogprobs;
using testing::SameTokens;
using ::testing::StartsWith;

struct Served {
  explicit Served(EngineOptions options = {}, testing::TinyOptions tiny = {},
                  absl::AnyInvocable<void(const StepReport&)> on_step = nullptr)
      : backend(testing::OpenTestDevice(1)), model(testing::TinyModel(*backend, tiny)) {
    auto created = Engine::Create(&model, *backend, options, std::move(on_step));
    CHECK(created.ok()) << created.status();
    engine = *std::move(created);
  }
  // Everything was given back and adds up.
  ~Served() {
    if (engine == nullptr) return;
    EXPECT_TRUE(engine->WaitIdle(absl::Seconds(60)));
    EXPECT_EQ(engine->CheckIntegrity(), absl::OkStatus());
    EXPECT_EQ(engine->Stats().cache.used_bytes, 0);
    EXPECT_EQ(engine->Stats().running + engine->Stats().queued, 0);
  }

  std::unique_ptr<Backend> backend;
  LoadedModel model;
  std::unique_ptr<Engine> engine;
};

EngineOptions Options(int batched_tokens = 512, int running = 16, int64_t cache_bytes = 8 << 20) {
  EngineOptions options;
  options.limits.max_batched_tokens = batched_tokens;
  options.limits.max_running = running;
  options.cache_bytes = cache_bytes;
  return options;
}

std::vector<int32_t> RandomPrompt(int tokens, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> prompt(tokens);
  for (int32_t& token : prompt) token = 3 + static_cast<int32_t>(random() % 280);
  return prompt;
}

Request Ask(const std::string& id, int prompt_tokens, int max_tokens, uint32_t seed = 1) {
  Request request;
  request.id = id;
  request.prompt = RandomPrompt(prompt_tokens, seed);
  request.sampling.seed = seed;
  request.stopping.max_tokens = max_tokens;
  request.stopping.ignore_eos = true;
  return request;
}

// Requests of all kinds of knobs, by number.
Request Varied(int i) {
  std::mt19937 random(100 + i);
  auto below = [&](int n) { return static_cast<int>(random() % n); };
  Request request = Ask(absl::StrCat("varied-", i), 1 + below(90), 1 + below(24), 50 + i);
  SamplingParams& sampling = request.sampling;
  if (i % 4 == 0) sampling.temperature = 0;
  if (i % 4 == 1) sampling.top_p = 0.9f;
  if (i % 4 == 2) sampling.top_k = 20;
  if (i % 3 == 0) sampling.repetition_penalty = 1.3f;
  if (i % 5 == 0) sampling.presence_penalty = 0.5f;
  if (i % 2 == 0) request.output.logprobs = 3;
  if (i % 3 == 1) request.n = 2;
  request.stopping.ignore_eos = i % 2 == 0;
  return request;
}

// EngineToTheBit: laws that need ops whose rows do not feel their neighbours nor their chunk to the
// bit, as the CPU's are. All others hold on every device.
TEST(EngineToTheBit, ABatchOfManyEqualsManyBatchesOfOneAtAnyChunkSize) {
  constexpr int kRequests = 16;
  std::vector<Request> requests;
  std::vector<Outcome> alone;
  {
    Served served(Options(512, 1));
    for (int i = 0; i < kRequests; ++i) {
      requests.push_back(Varied(i));
      alone.push_back(Complete(*served.engine, requests.back()));
      ASSERT_EQ(alone.back().status, absl::OkStatus());
    }
  }
  std::mt19937 random(3);
  for (int batched_tokens : {1, 7, 64, 512}) {
    Served served(Options(batched_tokens, 2 + static_cast<int>(random() % 14)));
    std::vector<int> order(kRequests);
    for (int i = 0; i < kRequests; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random);
    std::vector<Request> shuffled;
    for (int i : order) shuffled.push_back(requests[i]);
    const std::vector<Outcome> together = CompleteTogether(*served.engine, shuffled);
    for (int i = 0; i < kRequests; ++i) {
      EXPECT_TRUE(SameTokens(alone[order[i]], together[i]))
          << "request " << order[i] << " in steps of " << batched_tokens;
    }
  }
}

TEST(EngineToTheBit, APreemptedSequenceContinuesAsIfItNeverWas) {
  std::vector<Request> requests;
  for (int i = 0; i < 8; ++i) requests.push_back(Ask(absl::StrCat("r", i), 60, 120, 10 + i));
  requests[0].output.logprobs = 2;
  std::vector<Outcome> alone;
  {
    Served served;
    for (const Request& request : requests) alone.push_back(Complete(*served.engine, request));
  }
  // Room for about two and a half of them at their end.
  Served sizes;
  const int64_t bytes = DemandOf(sizes.engine->cache_shape(), 512).bytes;
  Served served(Options(64, 16, bytes));
  const std::vector<Outcome> together = CompleteTogether(*served.engine, requests);
  for (size_t i = 0; i < requests.size(); ++i) {
    ASSERT_EQ(together[i].status, absl::OkStatus());
    EXPECT_TRUE(SameTokens(alone[i], together[i])) << i;
  }
  EXPECT_GT(served.engine->Stats().preemptions, 0u);
}

TEST(Engine, TheSameSeedGivesTheSameTokensAndAnotherOthers) {
  Served served;
  Request request = Ask("a", 20, 30, 7);
  const Outcome first = Complete(*served.engine, request);
  EXPECT_TRUE(SameTokens(first, Complete(*served.engine, request)));
  request.sampling.seed = 8;
  EXPECT_FALSE(SameTokens(first, Complete(*served.engine, request)));
  request.sampling.seed.reset();
  const Outcome unseeded = Complete(*served.engine, request);
  EXPECT_FALSE(SameTokens(unseeded, Complete(*served.engine, request)));
}

TEST(EngineToTheBit, ChoicesDifferAndTheFirstIsTheOnlyChoiceOfN1) {
  std::optional<Outcome> reference;
  for (int running : {1, 3, 16}) {
    Served served(Options(64, running));
    Request request = Ask("one", 50, 20, 5);
    const Outcome one = Complete(*served.engine, request);
    request.n = 8;
    const uint64_t prompt_tokens = served.engine->Stats().prompt_tokens;
    const Outcome many = Complete(*served.engine, request);
    ASSERT_EQ(many.status, absl::OkStatus());
    EXPECT_EQ(many.prompts, 1);
    EXPECT_EQ(many.finished.completion_tokens, 8 * 20);
    EXPECT_EQ(many.choices[0].tokens, one.choices[0].tokens);
    std::set<std::vector<int32_t>> distinct;
    for (const Outcome::Choice& choice : many.choices) {
      EXPECT_EQ(choice.finish, FinishReason::kLength);
      distinct.insert(choice.tokens);
    }
    EXPECT_EQ(distinct.size(), 8u);
    EXPECT_EQ(served.engine->Stats().prompt_tokens - prompt_tokens, 50u);
    if (!reference.has_value()) reference = many;
    EXPECT_TRUE(SameTokens(*reference, many)) << "with " << running << " running";
    request.id = "again";
    EXPECT_TRUE(SameTokens(many, Complete(*served.engine, request)));
  }
}

TEST(Engine, ThePromptOfManyChoicesIsComputedOnce) {
  Served served(Options(64, 16));
  Request request = Ask("fork", 50, 20);
  request.n = 8;
  request.output.attention_spans = true;
  const Outcome outcome = Complete(*served.engine, request);
  ASSERT_EQ(outcome.status, absl::OkStatus());
  // The prompt, then every drawn token but each choice's last.
  EXPECT_EQ(served.engine->Stats().step_rows, 50u + 8 * 19);
  EXPECT_EQ(outcome.finished.spans->at(1, 0).queries, 8 * 20);
}

TEST(Engine, CancelEndsARequestWithinOneStepAtEveryPoint) {
  Served served(Options(16));
  Engine& engine = *served.engine;
  for (int after = 0; after < 20; ++after) {
    const Request request = Ask(absl::StrCat("c", after), 40, 400);
    Client client(engine, 1);
    int deltas = 0;
    client.on_event = [&](const Event& event) {
      if (event.kind != Event::Kind::kDelta) return;
      if (deltas++ == after) {
        EXPECT_TRUE(engine.Cancel(request.id));
      }
    };
    ASSERT_EQ(client.Submit(request), absl::OkStatus());
    if (after == 0) engine.Cancel(request.id);
    const Outcome outcome = client.Wait();
    EXPECT_TRUE(absl::IsCancelled(outcome.status)) << outcome.status;
    EXPECT_EQ(outcome.choices[0].finish, FinishReason::kCancelled);
    // Cancelled inside a step's events: the next step is not run.
    EXPECT_LE(outcome.finished.completion_tokens, after + 1);
    EXPECT_EQ(engine.Stats().cache.used_bytes, 0);
  }
  EXPECT_FALSE(engine.Cancel("c1")) << "no longer in flight";
  EXPECT_EQ(engine.Stats().cancelled, 20u);
}

TEST(Engine, CancelWhileQueuedOrReadingThePromptFreesEverything) {
  absl::Notification reading, go_on;
  int steps = 0;
  Served served(Options(4, 1), {}, [&](const StepReport&) {
    if (++steps != 3) return;  // 12 of 300 prompt tokens are read
    reading.Notify();
    go_on.WaitForNotification();
  });
  Client first(*served.engine, 1), second(*served.engine, 1);
  ASSERT_TRUE(first.Submit(Ask("first", 300, 100)).ok());
  ASSERT_TRUE(second.Submit(Ask("second", 300, 100)).ok());
  reading.WaitForNotification();
  EXPECT_TRUE(served.engine->Cancel("second"));
  EXPECT_TRUE(served.engine->Cancel("first"));
  go_on.Notify();
  for (Client* client : {&first, &second}) {
    const Outcome outcome = client->Wait();
    EXPECT_TRUE(absl::IsCancelled(outcome.status));
    EXPECT_EQ(outcome.prompts, 0);
    EXPECT_EQ(outcome.finished.prompt_tokens, 300);
    EXPECT_EQ(outcome.finished.completion_tokens, 0);
  }
  EXPECT_EQ(steps, 3);
}

TEST(Engine, ADeadlineEndsARequestWhereverItIs) {
  Served served(Options(512, 1));
  Client running(*served.engine, 1), queued(*served.engine, 3);
  // Half a second of tokens, longer than both deadlines.
  running.on_event = [](const Event&) { absl::SleepFor(absl::Milliseconds(1)); };
  Request slow = Ask("slow", 10, 480), behind = Ask("behind", 10, 480);
  behind.n = 3;
  slow.deadline = absl::Now() + absl::Milliseconds(60);
  behind.deadline = absl::Now() + absl::Milliseconds(40);
  ASSERT_TRUE(running.Submit(slow).ok());
  ASSERT_TRUE(queued.Submit(behind).ok());
  for (Client* client : {&running, &queued}) {
    const Outcome outcome = client->Wait();
    EXPECT_TRUE(absl::IsDeadlineExceeded(outcome.status)) << outcome.status;
    EXPECT_LT(outcome.finished.completion_tokens, 480);
  }
  EXPECT_EQ(served.engine->Stats().deadline_exceeded, 2u);
  slow.deadline = absl::Now() - absl::Seconds(1);
  EXPECT_TRUE(absl::IsDeadlineExceeded(Complete(*served.engine, slow).status));
}

TEST(Engine, AStopStringEndsTheTextBeforeIt) {
  Served served;
  Request request = Ask("free", 20, 60, 3);
  const Outcome free = Complete(*served.engine, request);
  const std::string& text = free.choices[0].text;
  // A part of the text in its middle, of whole characters, that occurs nowhere before.
  size_t begin = text.size() / 2;
  auto continues = [&](size_t i) { return (static_cast<unsigned char>(text[i]) & 0xc0) == 0x80; };
  while (continues(begin)) ++begin;
  size_t end = begin + 4;
  while (end < text.size() && continues(end)) ++end;
  const std::string stop = text.substr(begin, end - begin);
  const size_t at = text.find(stop);
  request.stopping.stop = {"never in the text, surely", stop};
  const Outcome stopped = Complete(*served.engine, request);
  EXPECT_EQ(stopped.choices[0].text, text.substr(0, at));
  EXPECT_EQ(stopped.choices[0].finish, FinishReason::kStop);
  EXPECT_EQ(stopped.choices[0].stop_text, stop);
  EXPECT_LT(stopped.choices[0].tokens.size(), free.choices[0].tokens.size());
  request.stopping.include_stop_in_output = true;
  EXPECT_EQ(Complete(*served.engine, request).choices[0].text, text.substr(0, at + stop.size()));
  request.stopping.min_tokens = 60;
  EXPECT_EQ(Complete(*served.engine, request).choices[0].tokens, free.choices[0].tokens);
}

TEST(Engine, TextIsTheDetokenizedTokens) {
  Served served;
  for (int i = 0; i < 20; ++i) {
    const Outcome outcome = Complete(*served.engine, Ask("t", 10, 40, 30 + i));
    TokenStream stream(*served.model.tokenizer, true);
    std::string expected;
    for (int32_t token : outcome.choices[0].tokens) expected += stream.Append(token);
    expected += stream.Flush();
    EXPECT_EQ(outcome.choices[0].text, expected);
  }
}

TEST(Engine, EosAndStopIdsEndTheTextButNotBeforeMinTokens) {
  Served served;
  Request request = Ask("eos", 10, 20);
  request.stopping.ignore_eos = false;
  request.sampling.logit_bias = {{kTinyEos, 100.0f}};
  Outcome outcome = Complete(*served.engine, request);
  EXPECT_EQ(outcome.choices[0].tokens, std::vector<int32_t>{kTinyEos});
  EXPECT_EQ(outcome.choices[0].text, "");
  EXPECT_EQ(outcome.choices[0].finish, FinishReason::kStop);
  EXPECT_EQ(outcome.choices[0].stop_token, kTinyEos);
  EXPECT_TRUE(outcome.choices[0].stop_is_eos);
  EXPECT_EQ(outcome.finished.completion_tokens, 1);

  request.stopping.min_tokens = 5;
  outcome = Complete(*served.engine, request);
  ASSERT_EQ(outcome.choices[0].tokens.size(), 6u);
  EXPECT_EQ(outcome.choices[0].tokens.back(), kTinyEos);

  request.stopping.min_tokens = 0;
  request.stopping.ignore_eos = true;
  outcome = Complete(*served.engine, request);
  EXPECT_EQ(outcome.choices[0].finish, FinishReason::kLength);
  EXPECT_EQ(outcome.choices[0].tokens.size(), 20u);

  const int letter = served.model.tokenizer->FindToken("x");
  ASSERT_GE(letter, 0);
  request.sampling.logit_bias = {{letter, 100.0f}};
  request.stopping.stop_token_ids = {letter};
  outcome = Complete(*served.engine, request);
  EXPECT_EQ(outcome.choices[0].stop_token, letter);
  EXPECT_FALSE(outcome.choices[0].stop_is_eos);
  EXPECT_EQ(outcome.choices[0].text, "");
  request.stopping.include_stop_in_output = true;
  EXPECT_EQ(Complete(*served.engine, request).choices[0].text, "x");
}

// A token's logprob when it was drawn is its logprob when it is read back as a prompt, bit for bit:
// both are the same row of the same model.
TEST(EngineToTheBit, OutputLogprobsEqualPromptLogprobsOfTheSameText) {
  for (int logit_rows : {16, 64}) {
    testing::TinyOptions tiny;
    tiny.max_logit_rows = logit_rows;  // the prompt's rows come in pieces of this
    Served served(Options(50, 8), tiny);
    Request request = Ask("out", 30, 40, 9);
    request.output.logprobs = 5;
    const Outcome out = Complete(*served.engine, request);
    ASSERT_EQ(out.choices[0].logprobs.size(), 40u);
    EXPECT_TRUE(out.prompt_logprobs.empty());

    Request again = request;
    again.output.logprobs.reset();
    again.output.prompt_logprobs = 5;
    again.stopping.max_tokens = 1;
    const auto& tokens = out.choices[0].tokens;
    again.prompt.insert(again.prompt.end(), tokens.begin(), tokens.end());
    const Outcome read = Complete(*served.engine, again);
    ASSERT_EQ(read.prompt_logprobs.size(), 70u);
    const std::vector<TokenLogprob> tail(read.prompt_logprobs.begin() + 30,
                                         read.prompt_logprobs.end());
    EXPECT_TRUE(SameLogprobs(tail, out.choices[0].logprobs));
    for (size_t i = 0; i < tokens.size(); ++i) {
      EXPECT_EQ(out.choices[0].logprobs[i].token, tokens[i]);
      EXPECT_LE(out.choices[0].logprobs[i].logprob, 0);
      EXPECT_EQ(out.choices[0].logprobs[i].top.size(), 5u);
    }
  }
}

TEST(EngineToTheBit, PromptLogprobsSurviveAPreemption) {
  Served sizes;
  const int64_t bytes = DemandOf(sizes.engine->cache_shape(), 512).bytes;
  Request asks = Ask("asks", 300, 4, 2);
  asks.output.prompt_logprobs = 1;
  const Outcome alone = Complete(*sizes.engine, asks);
  Served served(Options(16, 16, bytes));
  Client client(*served.engine, 1);
  ASSERT_TRUE(client.Submit(asks).ok());
  Request urgent = Ask("urgent", 400, 20, 3);
  urgent.priority = 5;
  EXPECT_TRUE(Complete(*served.engine, urgent).status.ok());
  const Outcome outcome = client.Wait();
  EXPECT_TRUE(SameLogprobs(outcome.prompt_logprobs, alone.prompt_logprobs));
  EXPECT_EQ(outcome.choices[0].tokens, alone.choices[0].tokens);
}

void ExpectSameSums(const SpanSums& a, const SpanSums& b) {
  ASSERT_EQ(a.sums.size(), b.sums.size());
  for (size_t i = 0; i < a.sums.size(); ++i) {
    // Sums of the same floats in doubles, in another order: equal to rounding.
    EXPECT_DOUBLE_EQ(a.sums[i].queries, b.sums[i].queries);
    EXPECT_NEAR(a.sums[i].far_mass, b.sums[i].far_mass, 1e-9);
    EXPECT_NEAR(a.sums[i].sink_mass, b.sums[i].sink_mass, 1e-9);
    EXPECT_DOUBLE_EQ(a.sums[i].sink_queries, b.sums[i].sink_queries);
    EXPECT_NEAR(a.sums[i].distance, b.sums[i].distance, 1e-7);
    EXPECT_NEAR(a.sums[i].entropy, b.sums[i].entropy, 1e-9);
    EXPECT_DOUBLE_EQ(a.sums[i].copy_hits, b.sums[i].copy_hits);
    EXPECT_EQ(a.sums[i].beyond_window, 0);
  }
}

TEST(Engine, SpansOfAllRequestsAddUpToTheTotals) {
  EngineOptions options = Options();
  options.span_every = 1;
  Served served(options);
  std::vector<Request> requests;
  for (int i = 0; i < 6; ++i) {
    requests.push_back(Ask(absl::StrCat("s", i), 20 + 10 * i, 15, i));
    requests.back().output.attention_spans = true;
  }
  SpanSums sum = EmptySums(served.model.model->spec());
  for (const Outcome& outcome : CompleteTogether(*served.engine, requests)) {
    ASSERT_TRUE(outcome.finished.spans.has_value());
    const SpanSums& own = *outcome.finished.spans;
    for (size_t i = 0; i < own.sums.size(); ++i) {
      HeadSums& to = sum.sums[i];
      const HeadSums& from = own.sums[i];
      EXPECT_EQ(from.queries, 15);
      to.queries += from.queries;
      to.far_mass += from.far_mass;
      to.sink_mass += from.sink_mass;
      to.sink_queries += from.sink_queries;
      to.distance += from.distance;
      to.entropy += from.entropy;
      to.copy_hits += from.copy_hits;
      double mass = 0;
      for (double bucket : from.mass_by_distance) mass += bucket;
      EXPECT_NEAR(mass, 15, 15e-3) << "probabilities of 15 queries";
    }
  }
  const SpanSnapshot totals = served.engine->spans().Snapshot();
  EXPECT_EQ(totals.observed_requests, 6u);
  EXPECT_EQ(totals.observed_queries, 6u * 15);
  ExpectSameSums(totals.sums, sum);
}

TEST(Engine, OneStepInNIsObservedAndARequestsOwnSpansAlways) {
  EngineOptions options = Options();
  options.span_every = 16;
  Served served(options);
  Request request = Ask("own", 10, 64);
  request.output.attention_spans = true;
  const Outcome outcome = Complete(*served.engine, request);
  EXPECT_EQ(outcome.finished.spans->at(1, 0).queries, 64);
  EXPECT_EQ(served.engine->spans().Snapshot().sampled_steps, 4u);
  EXPECT_EQ(served.engine->spans().Snapshot().observed_queries, 4u);
}

TEST(Engine, ProbesReportTheMassOnTheirRangesForTheFirstToken) {
  Served served(Options(7));
  Request request = Ask("probe", 40, 3);
  request.probes = {{0, 40}};
  const Outcome all = Complete(*served.engine, request);
  ASSERT_EQ(all.finished.probe_mass.size(), 4u);
  for (const auto& layer : all.finished.probe_mass) {
    for (float mass : layer) EXPECT_NEAR(mass, 1, 1e-3) << "the whole prompt has all mass";
  }
  request.probes = {{0, 20}};
  const Outcome far = Complete(*served.engine, request);
  for (float mass : far.finished.probe_mass[0]) EXPECT_EQ(mass, 0) << "outside a window of 8";
  float full = 0;
  for (float mass : far.finished.probe_mass[1]) full += mass;
  EXPECT_GT(full, 0);
}

TEST(Engine, WithSpansOffNothingIsObserved) {
  EngineOptions options = Options();
  options.spans = SpanLevel::kOff;
  options.span_every = 1;
  Served served(options);
  Request request = Ask("off", 10, 10);
  request.probes = {{0, 5}};
  const Outcome outcome = Complete(*served.engine, request);
  EXPECT_TRUE(outcome.status.ok());
  EXPECT_TRUE(outcome.finished.probe_mass.empty());
  EXPECT_EQ(served.engine->spans().Snapshot().observed_queries, 0u);
  EXPECT_EQ(served.engine->spans().Snapshot().sampled_steps, 0u);
  request.output.attention_spans = true;
  EXPECT_TRUE(absl::IsFailedPrecondition(Complete(*served.engine, request).status));
}

TEST(Engine, RefusesWhatCannotBeServedWithFieldValueAndLimit) {
  Served served;
  const float nan = std::nanf("");
  struct Case {
    const char* says;
    void (*change)(Request&);
  };
  static float kNan = nan;
  const Case cases[] = {
      {"prompt: has no tokens", [](Request& r) { r.prompt.clear(); }},
      {"prompt: token id 100000 ", [](Request& r) { r.prompt[1] = 100000; }},
      {"prompt: token id -1 ", [](Request& r) { r.prompt[1] = -1; }},
      {"512", [](Request& r) { r.stopping.max_tokens = 503; }},
      {"stopping.max_tokens: is 0", [](Request& r) { r.stopping.max_tokens = 0; }},
      {"stopping.min_tokens: is 11", [](Request& r) { r.stopping.min_tokens = 11; }},
      {"sampling.n: is 65", [](Request& r) { r.n = 65; }},
      {"sampling.top_k: is 4294967295, must be from 0 to 1073741824",
       [](Request& r) { r.sampling.top_k = 4294967295; }},
      {"sampling.n: is 0", [](Request& r) { r.n = 0; }},
      {"sampling.temperature: is nan", [](Request& r) { r.sampling.temperature = kNan; }},
      {"sampling.temperature: is -1", [](Request& r) { r.sampling.temperature = -1; }},
      {"sampling.top_p: is 0", [](Request& r) { r.sampling.top_p = 0; }},
      {"sampling.top_p: is 1.5", [](Request& r) { r.sampling.top_p = 1.5f; }},
      {"sampling.top_k: is -1", [](Request& r) { r.sampling.top_k = -1; }},
      {"sampling.min_p: is 2", [](Request& r) { r.sampling.min_p = 2; }},
      {"sampling.presence_penalty", [](Request& r) { r.sampling.presence_penalty = 2.5f; }},
      {"sampling.frequency_penalty", [](Request& r) { r.sampling.frequency_penalty = kNan; }},
      {"sampling.repetition_penalty", [](Request& r) { r.sampling.repetition_penalty = 0; }},
      {"sampling.logit_bias",
       [](Request& r) {
         r.sampling.logit_bias = {{100000, 1.0f}};
       }},
      {"sampling.logit_bias[1]: is nan",
       [](Request& r) {
         r.sampling.logit_bias = {{1, kNan}};
       }},
      {"1024",
       [](Request& r) {
         r.sampling.logit_bias.assign(1025, {1, 1.0f});
       }},
      {"stopping.stop", [](Request& r) { r.stopping.stop.assign(17, "x"); }},
      {"1024", [](Request& r) { r.stopping.stop = {std::string(1025, 'x')}; }},
      {"UTF-8", [](Request& r) { r.stopping.stop = {"\xc3\x28"}; }},
      {"stopping.stop[1]: is empty",
       [](Request& r) {
         r.stopping.stop = {"a", ""};
       }},
      {"output.logprobs: is 21", [](Request& r) { r.output.logprobs = 21; }},
      {"output.prompt_logprobs: is -1", [](Request& r) { r.output.prompt_logprobs = -1; }},
      {"probes",
       [](Request& r) {
         r.probes = {{5, 11}};
       }},
  };
  for (const Case& one : cases) {
    Request request = Ask("bad", 10, 10);
    one.change(request);
    const absl::Status status = Complete(*served.engine, request).status;
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << one.says << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(one.says));
  }
  EXPECT_TRUE(Complete(*served.engine, Ask("good", 10, 502)).status.ok()) << "exactly the context";
}

TEST(Engine, RefusesWhatNeverFitsAndWhatAFullQueueCannotTake) {
  Served sizes;
  const CacheShape shape = sizes.engine->cache_shape();
  EngineOptions options = Options(512, 1, DemandOf(shape, 200).bytes);
  options.limits.max_queued_requests = 3;
  options.limits.max_queued_tokens = 100;
  Served served(options);
  Engine& engine = *served.engine;
  absl::Status status = Complete(engine, Ask("large", 300, 100)).status;
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_THAT(std::string(status.message()), StartsWith("can never fit"));
  status = Complete(engine, Ask("longer than the queue", 101, 5)).status;
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_EQ(status.message(), "can never fit: the prompt has 101 tokens, the queue holds 100");

  // The first one runs and stands still in its sink while others queue.
  absl::Notification started, go_on;
  Client first(engine, 1);
  first.on_event = [&](const Event& event) {
    if (event.kind != Event::Kind::kPrompt) return;
    started.Notify();
    go_on.WaitForNotification();
  };
  ASSERT_TRUE(first.Submit(Ask("first", 10, 5)).ok());
  started.WaitForNotification();
  EXPECT_TRUE(absl::IsAlreadyExists(Complete(engine, Ask("first", 10, 5)).status));
  Client a(engine, 1), b(engine, 1), c(engine, 1);
  ASSERT_TRUE(a.Submit(Ask("a", 40, 5)).ok());
  ASSERT_TRUE(b.Submit(Ask("b", 40, 5)).ok());
  status = Complete(engine, Ask("tokens", 21, 5)).status;
  EXPECT_THAT(std::string(status.message()), StartsWith("queue is full: 80 prompt tokens"));
  ASSERT_TRUE(c.Submit(Ask("c", 10, 5)).ok());
  status = Complete(engine, Ask("requests", 1, 5)).status;
  EXPECT_THAT(std::string(status.message()), StartsWith("queue is full: 3 requests"));
  EXPECT_EQ(engine.Stats().queued_tokens, 90);
  go_on.Notify();
  for (Client* client : {&first, &a, &b, &c}) EXPECT_TRUE(client->Wait().status.ok());
  EXPECT_EQ(engine.Stats().queued_tokens, 0);
}

TEST(Engine, DrainsResumesAndEndsEverythingWhenItGoes) {
  Served served;
  Engine& engine = *served.engine;
  Client running(engine, 1);
  ASSERT_TRUE(running.Submit(Ask("running", 10, 300)).ok());
  engine.Drain();
  EXPECT_TRUE(engine.Stats().draining);
  EXPECT_TRUE(absl::IsUnavailable(Complete(engine, Ask("late", 10, 5)).status));
  EXPECT_TRUE(running.Wait().status.ok()) << "accepted requests finish";
  EXPECT_TRUE(engine.WaitIdle(absl::Seconds(10)));
  EXPECT_TRUE(engine.Idle());
  engine.Resume();
  EXPECT_TRUE(Complete(engine, Ask("again", 10, 5)).status.ok());

  std::vector<std::unique_ptr<Client>> clients;
  for (int i = 0; i < 20; ++i) {
    clients.push_back(std::make_unique<Client>(engine, 2));
    Request request = Ask(absl::StrCat("x", i), 50, 400);
    request.n = 2;
    ASSERT_TRUE(clients.back()->Submit(request).ok());
  }
  served.engine.reset();
  for (auto& client : clients) {
    ASSERT_TRUE(client->done());
    EXPECT_TRUE(absl::IsUnavailable(client->Wait().status));
  }
}

TEST(Engine, AnIdMayBeUsedAgainOnceItsRequestHasFinished) {
  Served served;
  Engine& engine = *served.engine;
  Client second(engine, 1);
  absl::Status resubmitted = absl::UnknownError("not tried");
  Client first(engine, 1);
  first.on_event = [&](const Event& event) {
    if (event.kind == Event::Kind::kFinished) resubmitted = second.Submit(Ask("id", 5, 5));
  };
  ASSERT_TRUE(first.Submit(Ask("id", 5, 5)).ok());
  EXPECT_TRUE(first.Wait().status.ok());
  EXPECT_EQ(resubmitted, absl::OkStatus());
  EXPECT_TRUE(second.Wait().status.ok());
}

TEST(Engine, RefusesOptionsThatTheModelCannotServe) {
  auto backend = testing::OpenTestDevice(1);
  LoadedModel model = testing::TinyModel(*backend);
  EngineOptions options = Options(513);
  EXPECT_TRUE(absl::IsInvalidArgument(Engine::Create(&model, *backend, options).status()));
  options = Options(512, 65);
  EXPECT_TRUE(absl::IsInvalidArgument(Engine::Create(&model, *backend, options).status()));
  options = Options();
  options.span_every = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(Engine::Create(&model, *backend, options).status()));
}

TEST(Engine, TheDefaultCacheHoldsAWholeContext) {
  Served served(Options(512, 16, 0));
  EXPECT_GE(served.engine->options().cache_bytes, int64_t{512} << 20);
  EXPECT_TRUE(Complete(*served.engine, Ask("whole", 500, 12)).status.ok());
}

}  // namespace
}  // namespace longspan
