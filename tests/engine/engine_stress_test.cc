// The engine's edge under load from several threads; to be run under ThreadSanitizer too.
#include <atomic>
#include <random>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/support/engine_client.h"
#include "tests/support/paths.h"
#include "tests/support/test_device.h"
#include "tests/support/tiny_model.h"

namespace longspan {
namespace {

using testing::Client;
using testing::Outcome;

constexpr int kThreads = 4;
constexpr int kRequests = 2000;

Request Random(std::mt19937& random, const std::string& id) {
  auto below = [&](int n) { return static_cast<int>(random() % n); };
  Request request;
  request.id = id;
  request.prompt.resize(1 + below(60));
  for (int32_t& token : request.prompt) token = 3 + below(280);
  request.stopping.max_tokens = 1 + below(24);
  request.n = below(8) == 0 ? 1 + below(4) : 1;
  request.priority = below(3);
  if (below(4) == 0) request.deadline = absl::Now() + absl::Milliseconds(1 + below(40));
  if (below(4) == 0) request.stopping.stop = {"a", "the"};
  if (below(6) == 0) request.sampling.temperature = 0;
  if (below(6) == 0) request.sampling.repetition_penalty = 1.2f;
  if (below(6) == 0) request.output.logprobs = 2;
  if (below(10) == 0) request.output.prompt_logprobs = 1;
  if (below(6) == 0) request.output.attention_spans = true;
  if (below(6) == 0) request.probes = {{0, 1}};
  return request;
}

// A tiny one on the CPU, so that ThreadSanitizer gets through; the shipped one on a device.
LoadedModel TestModel(Backend& backend) {
  if (backend.host_memory()) return testing::TinyModel(backend);
  auto model = LoadModel(testing::SourcePath("models/default"), backend, {});
  CHECK(model.ok()) << model.status();
  return *std::move(model);
}

TEST(EngineStress, RandomClientsLeaveNothingBehind) {
  const auto backend = testing::OpenTestDevice(2);
  LoadedModel model = TestModel(*backend);
  EngineOptions options;
  options.limits.max_batched_tokens = 48;
  options.limits.max_running = 12;
  options.limits.max_queued_requests = 64;
  const CacheShape shape =
      ShapeOf(model.model->spec(), model.model->cache_dtype(), options.page_tokens);
  options.cache_bytes = DemandOf(shape, 512).bytes;  // small, so that sequences are preempted
  options.span_every = 2;
  std::atomic<int> steps{0};
  auto created = Engine::Create(&model, *backend, options, [&](const StepReport&) { ++steps; });
  ASSERT_TRUE(created.ok()) << created.status();
  Engine& engine = **created;

  std::atomic<int> ended{0}, refused{0}, cancelled{0}, late{0};
  std::atomic<bool> watching{true};
  std::thread watcher([&] {
    while (watching) {
      const EngineStats stats = engine.Stats();
      EXPECT_LE(stats.running, options.limits.max_running);
      engine.spans().Snapshot();
      EXPECT_EQ(engine.CheckIntegrity(), absl::OkStatus());
      if (stats.steps % 50 == 7) engine.spans().Reset();
      absl::SleepFor(absl::Milliseconds(2));
    }
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<std::unique_ptr<Client>> clients;
      for (int i = 0; i < kRequests / kThreads; ++i) {
        const std::string id = absl::StrCat(t, "-", i);
        Request request = Random(random, id);
        auto client = std::make_unique<Client>(engine, request.n);
        const int cancel_after = random() % 5 == 0 ? static_cast<int>(random() % 8) : -1;
        if (random() % 20 == 0) {  // its reader stands still for a while
          client->on_event = [pause = random() % 5](const Event&) {
            absl::SleepFor(absl::Milliseconds(pause));
          };
        } else if (random() % 10 == 0) {  // the client leaves in the middle of an event
          client->on_event = [&engine, id, count = 0, cancel_after](const Event&) mutable {
            if (count++ == cancel_after) engine.Cancel(id);
          };
        }
        if (const absl::Status status = client->Submit(std::move(request)); !status.ok()) {
          EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
          ++refused;
          absl::SleepFor(absl::Milliseconds(3));
          continue;
        }
        if (cancel_after == 0) engine.Cancel(id);
        if (cancel_after > 4) {
          absl::SleepFor(absl::Milliseconds(1));
          engine.Cancel(id);
        }
        clients.push_back(std::move(client));
        if (clients.size() > 12) {
          clients.front()->Wait();
          ++ended;
          clients.erase(clients.begin());
        }
      }
      for (auto& client : clients) {
        const absl::Status status = client->Wait().status;
        cancelled += absl::IsCancelled(status);
        late += absl::IsDeadlineExceeded(status);
        ++ended;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_TRUE(engine.WaitIdle(absl::Seconds(60)));
  watching = false;
  watcher.join();
  EXPECT_EQ(ended + refused, kRequests);
  EXPECT_EQ(engine.CheckIntegrity(), absl::OkStatus());
  const EngineStats stats = engine.Stats();
  EXPECT_EQ(stats.cache.used_bytes, 0);
  EXPECT_EQ(stats.cache.sequences, 0);
  EXPECT_EQ(stats.running + stats.queued, 0);
  EXPECT_EQ(stats.queued_tokens, 0);
  EXPECT_EQ(stats.failed, 0u);
  EXPECT_EQ(stats.finished_stop + stats.finished_length + stats.cancelled + stats.deadline_exceeded,
            static_cast<uint64_t>(ended));
  EXPECT_GT(stats.cancelled, 0u);
  EXPECT_GT(stats.deadline_exceeded, 0u);
  EXPECT_GT(steps, 0);
  created->reset();  // joins while nothing is in flight
}

}  // namespace
}  // namespace longspan
