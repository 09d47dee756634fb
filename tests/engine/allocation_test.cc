// A steady step allocates nothing: counted by an operator new of this binary's own.
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/support/tiny_model.h"

namespace {

std::atomic<int64_t> allocations{0};
thread_local bool counted = true;  // not on the test's own thread

}  // namespace

#ifndef LONGSPAN_SANITIZED  // a sanitizer has its own

void* operator new(size_t bytes) {
  if (counted) allocations.fetch_add(1, std::memory_order_relaxed);
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void* operator new(size_t bytes, std::align_val_t alignment) {
  if (counted) allocations.fetch_add(1, std::memory_order_relaxed);
  const auto whole = static_cast<size_t>(alignment);
  void* memory = std::aligned_alloc(whole, (bytes + whole - 1) / whole * whole);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

#endif

namespace longspan {
namespace {

struct Step {
  int prefill_tokens = 0, decode_tokens = 0;
  int64_t allocations = 0;  // from the end of the step before to the end of this
};

class Allocation : public ::testing::Test {
 protected:
  void SetUp() override {
#ifdef LONGSPAN_SANITIZED
    GTEST_SKIP() << "a sanitizer has an operator new of its own";
#endif
    counted = false;
  }
  void TearDown() override { counted = true; }

  // The steps in which the requests, all there when the second begins, are run to their ends.
  static std::vector<Step> Run(std::vector<Request> requests, int batched_tokens, int running) {
    const std::unique_ptr<Backend> backend = Backend::Cpu({.threads = 2});
    LoadedModel model = testing::TinyModel(*backend);
    EngineOptions options;
    options.limits.max_batched_tokens = batched_tokens;
    options.limits.max_running = running;
    options.cache_bytes = 1 << 20;
    std::vector<Step> steps;
    steps.reserve(1000);
    int64_t before = 0;
    absl::Notification submitted;
    auto engine = Engine::Create(&model, *backend, options, [&](const StepReport& report) {
      submitted.WaitForNotification();
      const int64_t now = allocations;
      steps.push_back({report.prefill_tokens, report.decode_tokens, now - before});
      before = now;
    });
    CHECK(engine.ok()) << engine.status();
    for (Request& request : requests) {
      EXPECT_EQ((*engine)->Submit(std::move(request), [](const Event&) {}), absl::OkStatus());
    }
    submitted.Notify();
    EXPECT_TRUE((*engine)->WaitIdle(absl::Seconds(60)));
    engine->reset();  // the last request ends before its step
    return steps;
  }

  static Request Ask(const std::string& id, int prompt_tokens, int max_tokens) {
    Request request;
    request.id = id;
    for (int i = 0; i < prompt_tokens; ++i) request.prompt.push_back(3 + i * 31 % 280);
    request.sampling.seed = 1;
    request.stopping.max_tokens = max_tokens;
    request.stopping.ignore_eos = true;
    return request;
  }

  // In the steps with these numbers of tokens but the first `warm_up` and the last, of which
  // `least` are left or more.
  static void ExpectNone(const std::vector<Step>& steps, int prefill_tokens, int decode_tokens,
                         int warm_up, int least) {
    EXPECT_GT(steps.front().allocations, 0) << "nothing is counted";
    std::vector<int64_t> alike;
    for (const Step& step : steps) {
      if (step.prefill_tokens == prefill_tokens && step.decode_tokens == decode_tokens) {
        alike.push_back(step.allocations);
      }
    }
    const int last = static_cast<int>(alike.size()) - 1;
    EXPECT_GE(last - warm_up, least);
    for (int i = warm_up; i < last; ++i) EXPECT_EQ(alike[i], 0) << "step " << i;
  }
};

// Of three sequences, over four pages of 16 tokens, in attention whole and split; spans are due in
// every 16th.
TEST_F(Allocation, ASteadyDecodeStepAllocatesNothing) {
  std::vector<Request> requests = {Ask("biased", 5, 100), Ask("greedy", 270, 100),
                                   Ask("cut", 290, 100)};
  requests[0].sampling.logit_bias = {{7, 1.0f}, {9, -1.0f}};
  requests[1].sampling.temperature = 0;
  requests[2].sampling.top_k = 40;
  requests[2].sampling.top_p = 0.9f;
  ExpectNone(Run(std::move(requests), 512, 8), 0, 3, /*warm_up=*/20, /*least=*/64);
}

// The second of two prompts alike: the first has brought scratch memory to the size that it needs.
TEST_F(Allocation, ASteadyPrefillChunkAllocatesNothing) {
  ExpectNone(Run({Ask("first", 500, 1), Ask("second", 500, 1)}, 64, 1), 64, 0, /*warm_up=*/8,
             /*least=*/5);
}

TEST_F(Allocation, AStepOfBothAllocatesNothing) {
  const std::vector<Step> steps =
      Run({Ask("decodes", 5, 100), Ask("first", 500, 1), Ask("second", 500, 1)}, 64, 2);
  ExpectNone(steps, 63, 1, /*warm_up=*/8, /*least=*/5);
}

}  // namespace
}  // namespace longspan
