#pragma once
// The law of a deterministic backend, through engine, scheduler and caches: a request's tokens and
// logprobs are its own, to the bit, whatever shares its steps, cuts its prompt or takes its cache.
#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/support/engine_client.h"
#include "tests/support/paths.h"

namespace longspan::testing {

// The shipped model on one backend, and what 13 random requests get each alone.
class DeterministicLaw {
 public:
  explicit DeterministicLaw(std::unique_ptr<Backend> backend, DType cache_dtype = DType::kBF16)
      : backend_(std::move(backend)) {
    auto loaded = LoadModel(SourcePath("models/default"), *backend_, {.cache_dtype = cache_dtype});
    CHECK(loaded.ok()) << loaded.status();
    model_ = *std::move(loaded);
    for (int i = 0; i < kRequests; ++i) requests_.push_back(Random(i));
    const std::unique_ptr<Engine> engine = Open(512, 1, kCacheBytes);
    for (const Request& request : requests_) {
      alone_.push_back(Complete(*engine, request));
      EXPECT_EQ(alone_.back().status, absl::OkStatus());
    }
  }

  void ExpectTheSameAgain() {
    const std::unique_ptr<Engine> engine = Open(512, 1, kCacheBytes);
    for (int i = 0; i < kRequests; ++i) Expect(Complete(*engine, requests_[i]), i, "again");
  }
  // In steps of so many tokens: prompts are cut by what the others leave of a step.
  void ExpectTheSameAmongNeighbours(int batched_tokens) {
    ExpectTheSameTogether(kRequests, batched_tokens, kCacheBytes);
  }
  // In a cache that lets 8 short prompts begin and some three of them end.
  void ExpectTheSameAfterPreemption() {
    const CacheShape shape = ShapeOf(model_.model->spec(), model_.model->cache_dtype(), kPage);
    EXPECT_GT(ExpectTheSameTogether(8, 64, DemandOf(shape, 300).bytes), 0u);
  }

 private:
  static constexpr int kRequests = 13, kContext = 1024, kPage = 16;
  static constexpr int64_t kCacheBytes = 64 << 20;

  // Prompts on both sides of the sizes at which a backend could choose another kernel.
  static Request Random(int i) {
    constexpr int kPrompts[kRequests] = {1, 2, 7, 15, 16, 17, 40, 64, 100, 255, 257, 400, 760};
    std::mt19937 random(i + 1);
    Request request;
    request.id = absl::StrCat("request-", i);
    request.prompt.resize(kPrompts[i]);
    for (int32_t& token : request.prompt) token = 3 + static_cast<int32_t>(random() % 8000);
    request.sampling.seed = i;
    request.sampling.temperature = i % 3 == 0 ? 0.0f : 1.0f;
    request.output.logprobs = 3;
    if (i % 2 == 0) request.output.prompt_logprobs = 1;
    request.stopping.max_tokens = 40 + i;
    request.stopping.ignore_eos = true;
    return request;
  }

  std::unique_ptr<Engine> Open(int batched_tokens, int running, int64_t cache_bytes) {
    EngineOptions options;
    options.limits.max_batched_tokens = batched_tokens;
    options.limits.max_running = running;
    options.cache_bytes = cache_bytes;
    options.max_context = kContext;
    options.page_tokens = kPage;
    auto engine = Engine::Create(&model_, *backend_, options);
    CHECK(engine.ok()) << engine.status();
    return *std::move(engine);
  }

  // The first `count` requests. Returns how often one gave way.
  uint64_t ExpectTheSameTogether(int count, int batched_tokens, int64_t cache_bytes) {
    const std::unique_ptr<Engine> engine = Open(batched_tokens, kRequests, cache_bytes);
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i) order[i] = i;
    std::mt19937 random(batched_tokens);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<std::unique_ptr<Client>> clients;
    for (const int i : order) {
      clients.push_back(std::make_unique<Client>(*engine, 1));
      EXPECT_EQ(clients.back()->Submit(requests_[i]), absl::OkStatus());
    }
    for (int n = 0; n < count; ++n) {
      Expect(clients[n]->Wait(), order[n], absl::StrCat("in steps of ", batched_tokens));
    }
    return engine->Stats().preemptions;
  }

  void Expect(const Outcome& outcome, int i, const std::string& how) {
    EXPECT_EQ(outcome.status, absl::OkStatus());
    EXPECT_TRUE(SameTokens(outcome, alone_[i]) &&
                SameLogprobs(outcome.prompt_logprobs, alone_[i].prompt_logprobs))
        << "a prompt of " << requests_[i].prompt.size() << " tokens " << how;
  }

  std::unique_ptr<Backend> backend_;
  LoadedModel model_;
  std::vector<Request> requests_;
  std::vector<Outcome> alone_;
};

}  // namespace longspan::testing
