// Two thousand unruly clients over gRPC: what they leave behind is nothing.
#include <atomic>
#include <map>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "tests/support/test_server.h"

namespace longspan {
namespace {

using testing::Prompt;

constexpr int kThreads = 8;
constexpr int kRequests = 2000;

enum Kind { kUnary, kStream, kCancelled, kLate, kStopsReading, kBad, kKinds };

// How a call of each kind may end. Any may find the queue full.
const std::set<grpc::StatusCode>& Endings(Kind kind) {
  using C = grpc::StatusCode;
  static const std::map<Kind, std::set<C>> endings = {
      {kUnary, {C::OK, C::RESOURCE_EXHAUSTED}},
      {kStream, {C::OK, C::RESOURCE_EXHAUSTED}},
      {kCancelled, {C::OK, C::CANCELLED, C::RESOURCE_EXHAUSTED}},
      {kLate, {C::OK, C::DEADLINE_EXCEEDED, C::RESOURCE_EXHAUSTED}},
      {kStopsReading, {C::OK, C::CANCELLED, C::RESOURCE_EXHAUSTED}},
      {kBad, {C::INVALID_ARGUMENT, C::NOT_FOUND}},
  };
  return endings.at(kind);
}

class Client {
 public:
  Client(testing::TestServer& server, unsigned seed)
      : stub_(v1::InferenceService::NewStub(server.NewChannel())), random_(seed) {}

  grpc::StatusCode Run(Kind kind) {
    v1::CompleteRequest request = Prompt(std::string(1 + Below(80), 'a'), 1 + Below(16));
    request.set_priority(Below(3));
    if (Below(4) == 0) request.mutable_sampling()->set_n(1 + Below(3));
    if (Below(4) == 0) request.mutable_sampling()->set_temperature(1);
    if (Below(4) == 0) request.mutable_stopping()->add_stop("e");
    if (Below(8) == 0) request.mutable_output()->set_logprobs(5);
    if (Below(8) == 0) request.mutable_output()->set_return_attention_spans(true);
    if (kind == kBad) Spoil(request);
    return kind == kUnary || kind == kLate || kind == kBad ? Unary(kind, request)
                                                           : Stream(kind, request);
  }

 private:
  int Below(int n) { return static_cast<int>(random_() % n); }

  void Spoil(v1::CompleteRequest& request) {
    switch (Below(6)) {
      case 0:
        request.clear_prompt();
        break;
      case 1:
        request.mutable_sampling()->set_temperature(-1);
        break;
      case 2:
        request.mutable_token_ids()->add_ids(1u << 30);
        break;
      case 3:
        request.mutable_stopping()->set_max_tokens(1u << 31);
        break;
      case 4:
        request.set_model("another");
        break;
      default:
        request.mutable_sampling()->set_n(1000);
    }
  }

  grpc::StatusCode Unary(Kind kind, const v1::CompleteRequest& request) {
    grpc::ClientContext context;
    if (kind == kLate) {
      context.set_deadline(std::chrono::system_clock::now() +
                           std::chrono::milliseconds(1 + Below(80)));
    }
    v1::CompleteResponse response;
    return stub_->Complete(&context, request, &response).error_code();
  }

  grpc::StatusCode Stream(Kind kind, const v1::CompleteRequest& request) {
    grpc::ClientContext context;
    v1::StreamCompleteRequest streamed;
    *streamed.mutable_request() = request;
    auto reader = stub_->StreamComplete(&context, streamed);
    v1::StreamCompleteResponse event;
    for (int i = 0; reader->Read(&event); ++i) {
      if (kind == kStream || i < Below(6)) continue;
      if (kind == kStopsReading) absl::SleepFor(absl::Milliseconds(Below(200)));
      context.TryCancel();
    }
    return reader->Finish().error_code();
  }

  std::unique_ptr<v1::InferenceService::Stub> stub_;
  std::mt19937 random_;
};

TEST(Load, TwoThousandUnrulyRequestsLeaveNothingBehind) {
  ServerConfig config = testing::TestConfig();
  config.max_running = 16;
  config.max_queued_requests = 12;  // so that some are refused
  config.cache_bytes = 4 << 20;     // so that some are preempted
  config.max_context = 1024;
  config.attention_sample_every = 4;
  testing::TestServer server(config);  // expects an idle, whole cache when it goes

  std::atomic<int> ended[kKinds] = {};
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      Client client(server, 7 + t);
      for (int i; (i = next++) < kRequests;) {
        const Kind kind = static_cast<Kind>(i % kKinds);
        const grpc::StatusCode code = client.Run(kind);
        EXPECT_TRUE(Endings(kind).contains(code)) << "kind " << kind << " ended with " << code;
        ++ended[kind];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();

  int all = 0;
  for (const auto& count : ended) all += count;
  EXPECT_EQ(all, kRequests);
  EXPECT_TRUE(server.engine().WaitIdle(absl::Seconds(20)));
  EXPECT_EQ(server.Metric("longspan_requests_running"), 0);
  EXPECT_EQ(server.Metric("longspan_requests_waiting"), 0);
  EXPECT_EQ(server.Metric("longspan_kv_cache_usage_ratio"), 0);
  EXPECT_EQ(server.Metric("longspan_requests_total{outcome=\"failed\"}"), 0);
  EXPECT_GT(server.Metric("longspan_requests_total{outcome=\"length\"}"), 0);
  EXPECT_GT(server.Metric("longspan_requests_total{outcome=\"cancelled\"}"), 0);

  v1::CompleteResponse response;
  grpc::ClientContext context;
  EXPECT_TRUE(server.inference()->Complete(&context, Prompt("Once", 4), &response).ok());
}

}  // namespace
}  // namespace longspan
