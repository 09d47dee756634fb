// The whole server in one process, over real connections, with the default model.
#include "server/server.h"

#include <cstdio>
#include <fstream>
#include <limits>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "longspan/v1/needle.grpc.pb.h"
#include "tests/support/paths.h"
#include "tests/support/test_server.h"

namespace longspan {
namespace {

using testing::CallRaw;
using testing::DetailOf;
using ::testing::HasSubstr;
using ::testing::Not;
using testing::Prompt;
using testing::TestConfig;
using testing::TestServer;

constexpr char kInference[] = "longspan.v1.InferenceService";

// One server for the tests that leave it as it was.
class ServerTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { shared_ = new TestServer; }
  static void TearDownTestSuite() {
    delete shared_;
    shared_ = nullptr;
  }
  static TestServer* shared_;
  std::unique_ptr<v1::InferenceService::Stub> stub_ = shared_->inference();

  grpc::Status Complete(const v1::CompleteRequest& request, v1::CompleteResponse* response) {
    grpc::ClientContext context;
    return stub_->Complete(&context, request, response);
  }
  grpc::Status Complete(const v1::CompleteRequest& request) {
    v1::CompleteResponse response;
    return Complete(request, &response);
  }
};
TestServer* ServerTest::shared_ = nullptr;

TEST_F(ServerTest, CompletesAPrompt) {
  v1::CompleteResponse response;
  grpc::ClientContext context;
  auto request = Prompt("Once upon a time", 12);
  request.set_request_id("mine-1");
  ASSERT_TRUE(stub_->Complete(&context, request, &response).ok());
  ASSERT_EQ(response.choices_size(), 1);
  EXPECT_FALSE(response.choices(0).text().empty());
  EXPECT_EQ(response.choices(0).finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(response.request_id(), "mine-1");
  EXPECT_FALSE(response.model().empty());
  EXPECT_EQ(response.usage().completion_tokens(), 12u);
  EXPECT_EQ(response.usage().total_tokens(), response.usage().prompt_tokens() + 12);
  EXPECT_GT(response.timings().time_to_first_token_seconds(), 0);
  const auto& initial = context.GetServerInitialMetadata();
  const auto id = initial.find("x-request-id");
  ASSERT_NE(id, initial.end());
  EXPECT_EQ(std::string(id->second.data(), id->second.size()), "mine-1");
}

TEST_F(ServerTest, StreamsThePromptThenDeltasThenUsageThatAddUpToTheUnaryAnswer) {
  v1::CompleteResponse whole;
  auto request = Prompt("Once upon a time", 20);
  request.mutable_output()->set_return_token_ids(true);
  ASSERT_TRUE(Complete(request, &whole).ok());

  v1::StreamCompleteRequest streamed;
  *streamed.mutable_request() = request;
  streamed.set_include_usage(true);
  grpc::ClientContext context;
  auto reader = stub_->StreamComplete(&context, streamed);
  v1::StreamCompleteResponse message;
  std::vector<v1::StreamCompleteResponse> all;
  while (reader->Read(&message)) all.push_back(message);
  ASSERT_TRUE(reader->Finish().ok());
  ASSERT_GE(all.size(), 3u);
  EXPECT_TRUE(all.front().has_prompt());
  EXPECT_EQ(all.front().prompt().prompt_tokens(), whole.usage().prompt_tokens());
  EXPECT_TRUE(all.back().has_usage());
  EXPECT_EQ(all.back().usage().completion_tokens(), 20u);
  std::string text;
  std::vector<uint32_t> ids;
  for (size_t i = 1; i + 1 < all.size(); ++i) {
    ASSERT_TRUE(all[i].has_delta());
    const bool last = i + 2 == all.size();
    EXPECT_EQ(all[i].delta().finish_reason(),
              last ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_UNSPECIFIED);
    text += all[i].delta().text();
    for (uint32_t id : all[i].delta().token_ids()) ids.push_back(id);
  }
  EXPECT_EQ(text, whole.choices(0).text());
  EXPECT_EQ(ids, std::vector<uint32_t>(whole.choices(0).token_ids().begin(),
                                       whole.choices(0).token_ids().end()));
}

TEST_F(ServerTest, GivesEachChoiceAndTheLogprobsAndSpansThatWereAskedFor) {
  auto request = Prompt("Once upon a time", 6);
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(7);
  request.mutable_sampling()->set_n(3);
  request.mutable_output()->set_logprobs(4);
  request.mutable_output()->set_prompt_logprobs(2);
  request.mutable_output()->set_echo(true);
  request.mutable_output()->set_return_attention_spans(true);
  v1::CompleteResponse response;
  ASSERT_TRUE(Complete(request, &response).ok());
  ASSERT_EQ(response.choices_size(), 3);
  for (int i = 0; i < 3; ++i) {
    const v1::Choice& choice = response.choices(i);
    EXPECT_EQ(choice.index(), static_cast<uint32_t>(i));
    EXPECT_TRUE(absl::StartsWith(choice.text(), "Once upon a time")) << choice.text();
    ASSERT_EQ(choice.logprobs_size(), 6);
    for (const v1::TokenLogprob& logprob : choice.logprobs()) {
      EXPECT_LE(logprob.logprob(), 0);
      ASSERT_EQ(logprob.top_size(), 4);
      EXPECT_GE(logprob.top(0).logprob(), logprob.top(3).logprob());
    }
  }
  EXPECT_EQ(static_cast<uint32_t>(response.prompt_logprobs_size()),
            response.usage().prompt_tokens());
  EXPECT_FALSE(response.prompt_logprobs(0).has_logprob());
  EXPECT_TRUE(response.prompt_logprobs(1).has_logprob());
  ASSERT_EQ(response.attention_spans().layers_size(), 10);
  for (const v1::LayerSpans& layer : response.attention_spans().layers()) {
    EXPECT_GT(layer.observed_queries(), 0u);
    ASSERT_EQ(layer.far_mass_ratio_size(), 6);
    for (float mass : layer.far_mass_ratio()) {
      if (layer.kind() == v1::LAYER_KIND_SLIDING) {
        EXPECT_EQ(mass, 0);
      }
    }
  }
}

TEST_F(ServerTest, WithoutTextGivesOnlyIds) {
  auto request = Prompt("Once upon a time", 4);
  request.mutable_output()->set_return_text(false);
  request.mutable_output()->set_echo(true);
  request.mutable_output()->set_return_token_ids(true);
  v1::CompleteResponse response;
  ASSERT_TRUE(Complete(request, &response).ok());
  EXPECT_EQ(response.choices(0).text(), "");
  EXPECT_EQ(response.choices(0).token_ids_size(), 4);
}

TEST_F(ServerTest, TokenizesAndBack) {
  grpc::ClientContext first, second;
  v1::TokenizeRequest request;
  request.set_text("Hello, wörld 🌍");
  request.set_return_pieces(true);
  request.set_add_special_tokens(false);
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub_->Tokenize(&first, request, &tokens).ok());
  EXPECT_EQ(tokens.pieces_size(), tokens.token_ids_size());
  EXPECT_EQ(tokens.max_model_len(), 16384u);
  v1::DetokenizeRequest back;
  *back.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(stub_->Detokenize(&second, back, &text).ok());
  EXPECT_EQ(text.text(), "Hello, wörld 🌍");
}

struct BadCase {
  const char* field;  // in BadRequest
  std::function<void(v1::CompleteRequest&)> spoil;
  const char* says;  // part of the message
};

TEST_F(ServerTest, RefusesEachBadFieldWithItsNameValueAndLimit) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const BadCase cases[] = {
      {"prompt", [](auto& r) { r.set_text(""); }, "is empty"},
      {"prompt", [](auto& r) { r.clear_prompt(); }, "is not set"},
      {"prompt", [](auto& r) { r.mutable_token_ids()->clear_ids(); }, "has no tokens"},
      {"prompt", [](auto& r) { r.mutable_token_ids()->add_ids(8192); }, "8192"},
      {"prompt", [](auto& r) { r.mutable_stopping()->set_max_tokens(16384); }, "16384"},
      {"prompt", [](auto& r) { r.set_text(std::string(9 << 20, 'a')); }, "8388608"},
      {"sampling.temperature", [=](auto& r) { r.mutable_sampling()->set_temperature(nan); }, "nan"},
      {"sampling.temperature", [](auto& r) { r.mutable_sampling()->set_temperature(-1); }, "-1"},
      {"sampling.top_p", [](auto& r) { r.mutable_sampling()->set_top_p(1.5); }, "1.5"},
      {"sampling.top_p", [](auto& r) { r.mutable_sampling()->set_top_p(0); }, "0"},
      {"sampling.min_p", [=](auto& r) { r.mutable_sampling()->set_min_p(nan); }, "nan"},
      {"sampling.presence_penalty", [](auto& r) { r.mutable_sampling()->set_presence_penalty(3); },
       "3"},
      {"sampling.repetition_penalty",
       [](auto& r) { r.mutable_sampling()->set_repetition_penalty(0); }, "0"},
      {"sampling.n", [](auto& r) { r.mutable_sampling()->set_n(0); }, "0"},
      {"sampling.n", [](auto& r) { r.mutable_sampling()->set_n(65); }, "64"},
      {"sampling.n", [](auto& r) { r.mutable_sampling()->set_n(4294967295); }, "4294967295"},
      {"sampling.top_k", [](auto& r) { r.mutable_sampling()->set_top_k(4294967295); },
       "4294967295"},
      {"sampling.logit_bias[1]",
       [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[1] = 101; }, "100"},
      {"sampling.logit_bias",
       [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[4294967295] = 1; },
       "4294967295"},
      {"sampling.logit_bias",
       [](auto& r) { (*r.mutable_sampling()->mutable_logit_bias())[9999] = 1; }, "8192"},
      {"stopping.max_tokens", [](auto& r) { r.mutable_stopping()->set_max_tokens(0); }, "0"},
      {"stopping.min_tokens", [](auto& r) { r.mutable_stopping()->set_min_tokens(9); }, "9"},
      {"stopping.min_tokens", [](auto& r) { r.mutable_stopping()->set_min_tokens(4294967295); },
       "4294967295"},
      {"prompt", [](auto& r) { r.mutable_stopping()->set_max_tokens(4294967295); }, "4294967295"},
      {"stopping.stop[0]", [](auto& r) { r.mutable_stopping()->add_stop(""); }, "empty"},
      {"stopping.stop[1]",
       [](auto& r) {
         r.mutable_stopping()->add_stop("good");
         r.mutable_stopping()->add_stop(std::string(1025, 's'));
       },
       "1024"},
      {"stopping.stop",
       [](auto& r) {
         for (int i = 0; i < 17; ++i) r.mutable_stopping()->add_stop(std::string(1, 'x'));
       },
       "16"},
      {"stopping.stop_token_ids", [](auto& r) { r.mutable_stopping()->add_stop_token_ids(8192); },
       "8192"},
      {"output.logprobs", [](auto& r) { r.mutable_output()->set_logprobs(21); }, "20"},
      {"output.prompt_logprobs", [](auto& r) { r.mutable_output()->set_prompt_logprobs(21); },
       "20"},
      {"request_id", [](auto& r) { r.set_request_id("bad\n"); }, "10"},
      {"truncate_prompt_tokens", [](auto& r) { r.set_truncate_prompt_tokens(0); }, "0"},
  };
  for (const BadCase& bad : cases) {
    auto request = Prompt("Once", 4);
    bad.spoil(request);
    const grpc::Status status = Complete(request);
    EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT) << bad.field;
    EXPECT_THAT(status.error_message(), HasSubstr(bad.says)) << bad.field;
    const auto details = DetailOf<google::rpc::BadRequest>(status);
    ASSERT_EQ(details.field_violations_size(), 1) << bad.field << ": " << status.error_message();
    EXPECT_EQ(details.field_violations(0).field(), bad.field);
  }
  EXPECT_TRUE(Complete(Prompt("still serving", 1)).ok());
}

TEST_F(ServerTest, SaysWhyAPromptIsTooLong) {
  const grpc::Status status = Complete(Prompt("Once", 16384));
  EXPECT_EQ(DetailOf<google::rpc::ErrorInfo>(status).reason(), "CONTEXT_LENGTH_EXCEEDED");
}

TEST_F(ServerTest, AnswersA64MiBPromptWithTheFieldAndTheLimit) {
  const grpc::Status status = Complete(Prompt(std::string(64 << 20, 'a'), 1));
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("prompt: has 67108864 bytes"));
}

TEST_F(ServerTest, RefusesAModelThatItDoesNotServe) {
  auto request = Prompt("Once", 1);
  request.set_model("other");
  EXPECT_EQ(Complete(request).error_code(), grpc::NOT_FOUND);
}

// protobuf refuses the message before any handler sees it.
TEST_F(ServerTest, RefusesBrokenUtf8InAStopStringByName) {
  v1::CompleteRequest request = Prompt("Once", 1);
  request.mutable_stopping()->add_stop("QQ");
  std::string bytes = request.SerializeAsString(), response;
  bytes[bytes.find("QQ")] = '\xc3';  // a lead byte without its second
  const grpc::Status status = testing::CallRaw(
      shared_->channel(), absl::StrCat("/", kInference, "/Complete"), bytes, &response);
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT) << status.error_message();
  EXPECT_EQ(DetailOf<google::rpc::BadRequest>(status).field_violations(0).field(), "stopping.stop");
}

TEST_F(ServerTest, RefusesBytesThatAreNoMessage) {
  std::string response;
  const grpc::Status status =
      testing::CallRaw(shared_->channel(), absl::StrCat("/", kInference, "/Complete"),
                       std::string("\xff\xff\xff\xff\xff", 5), &response);
  EXPECT_EQ(status.error_code(), grpc::INVALID_ARGUMENT) << status.error_message();
}

TEST_F(ServerTest, RefusesAChatWithAModelThatHasNoTemplate) {
  grpc::ClientContext context;
  v1::ChatRequest request;
  request.add_messages()->set_content("hi");
  v1::ChatResponse response;
  EXPECT_EQ(stub_->Chat(&context, request, &response).error_code(), grpc::FAILED_PRECONDITION);
}

// A long request in flight, by id; ended by the destructor.
class LongRequest {
 public:
  LongRequest(v1::InferenceService::Stub& stub, const std::string& id) {
    v1::StreamCompleteRequest request;
    *request.mutable_request() = Prompt("Once upon a time", 8000);
    request.mutable_request()->set_request_id(id);
    reader_ = stub.StreamComplete(&context_, request);
    v1::StreamCompleteResponse message;
    EXPECT_TRUE(reader_->Read(&message));  // it runs
  }
  ~LongRequest() {
    context_.TryCancel();
    Rest();
  }
  grpc::Status Rest() {
    if (!done_) {
      v1::StreamCompleteResponse message;
      while (reader_->Read(&message)) {
      }
      status_ = reader_->Finish();
      done_ = true;
    }
    return status_;
  }
  void Cancel() { context_.TryCancel(); }

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReader<v1::StreamCompleteResponse>> reader_;
  bool done_ = false;
  grpc::Status status_;
};

TEST_F(ServerTest, RefusesAnIdThatIsInFlightAndLeavesItsOwnerAlone) {
  LongRequest owner(*stub_, "same");
  auto request = Prompt("Once", 1);
  request.set_request_id("same");
  EXPECT_EQ(Complete(request).error_code(), grpc::ALREADY_EXISTS);
  EXPECT_FALSE(shared_->engine().Idle());
}

TEST_F(ServerTest, FreesEverythingWhenTheClientCancels) {
  {
    LongRequest request(*stub_, "gone");
    // Numbers are published after a step, its tokens a moment before.
    const absl::Time limit = absl::Now() + absl::Seconds(5);
    while (shared_->engine().Stats().cache.used_bytes == 0 && absl::Now() < limit) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    EXPECT_GT(shared_->engine().Stats().cache.used_bytes, 0);
    request.Cancel();
    EXPECT_EQ(request.Rest().error_code(), grpc::CANCELLED);
  }
  EXPECT_TRUE(shared_->engine().WaitIdle(absl::Seconds(5)));
  EXPECT_EQ(shared_->engine().Stats().cache.used_bytes, 0);
}

TEST_F(ServerTest, AbortEndsARequestByIdAndIgnoresUnknownOnes) {
  LongRequest request(*stub_, "to-abort");
  v1::AbortRequest abort;
  abort.add_request_ids("to-abort");
  abort.add_request_ids("unknown");
  v1::AbortResponse response;
  grpc::ClientContext context;
  ASSERT_TRUE(stub_->Abort(&context, abort, &response).ok());
  ASSERT_EQ(response.aborted_request_ids_size(), 1);
  EXPECT_EQ(response.aborted_request_ids(0), "to-abort");
  EXPECT_EQ(request.Rest().error_code(), grpc::CANCELLED);
}

TEST_F(ServerTest, EndsARequestAtItsDeadline) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(150));
  v1::CompleteResponse response;
  EXPECT_EQ(stub_->Complete(&context, Prompt("Once", 8000), &response).error_code(),
            grpc::DEADLINE_EXCEEDED);
  EXPECT_TRUE(shared_->engine().WaitIdle(absl::Seconds(5)));
}

TEST_F(ServerTest, Serves64RequestsAtOnce) {
  v1::CompleteResponse alone;
  ASSERT_TRUE(Complete(Prompt("Once upon a time", 8), &alone).ok());
  std::vector<std::thread> threads;
  std::atomic<int> equal{0};
  for (int i = 0; i < 64; ++i) {
    threads.emplace_back([&] {
      v1::CompleteResponse response;
      if (Complete(Prompt("Once upon a time", 8), &response).ok() &&
          response.choices(0).text() == alone.choices(0).text()) {
        ++equal;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(equal, 64);
}

TEST_F(ServerTest, DescribesItsModelAndItself) {
  auto models = v1::ModelService::NewStub(shared_->channel());
  grpc::ClientContext a, b, c, d;
  v1::ListModelsResponse list;
  ASSERT_TRUE(models->ListModels(&a, {}, &list).ok());
  ASSERT_EQ(list.items_size(), 1);
  EXPECT_EQ(list.items(0).layers_size(), 10);
  EXPECT_EQ(list.items(0).layers(0).kind(), v1::LAYER_KIND_SLIDING);
  EXPECT_EQ(list.items(0).layers(0).window_tokens(), 64u);
  EXPECT_EQ(list.items(0).layers(1).kind(), v1::LAYER_KIND_FULL);
  EXPECT_EQ(list.items(0).num_parameters(), 18'145'152u);  // the model card's
  EXPECT_FALSE(list.items(0).has_chat_template());
  v1::GetModelRequest unknown;
  unknown.set_id("other");
  v1::GetModelResponse model;
  EXPECT_EQ(models->GetModel(&b, unknown, &model).error_code(), grpc::NOT_FOUND);
  auto admin = v1::AdminService::NewStub(shared_->channel());
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(admin->GetServerInfo(&c, {}, &info).ok());
  EXPECT_EQ(info.version(), "0.1.0");
  EXPECT_GT(info.total_kv_blocks(), 0u);
  v1::GetLoadResponse load;
  ASSERT_TRUE(admin->GetLoad(&d, {}, &load).ok());
  EXPECT_EQ(load.state(), v1::SERVING_STATE_SERVING);
}

TEST_F(ServerTest, ReportsWatchesAndResetsAttentionSpans) {
  auto request = Prompt("Once upon a time", 64);
  ASSERT_TRUE(Complete(request).ok());
  auto stub = v1::AttentionService::NewStub(shared_->channel());
  grpc::ClientContext a, b, c, d;
  v1::GetAttentionSpansRequest get;
  get.mutable_filter()->add_layers(5);
  v1::GetAttentionSpansResponse got;
  ASSERT_TRUE(stub->GetAttentionSpans(&a, get, &got).ok());
  ASSERT_EQ(got.snapshot().layers_size(), 1);
  EXPECT_EQ(got.snapshot().layers(0).layer(), 5u);
  EXPECT_GT(got.snapshot().observed_tokens(), 0u);
  get.mutable_filter()->set_request_id("x");
  EXPECT_EQ(stub->GetAttentionSpans(&b, get, &got).error_code(), grpc::INVALID_ARGUMENT);

  v1::WatchAttentionSpansRequest watch;
  watch.mutable_interval()->set_nanos(100'000'000);
  auto reader = stub->WatchAttentionSpans(&c, watch);
  v1::WatchAttentionSpansResponse first, second;
  ASSERT_TRUE(reader->Read(&first));
  EXPECT_FALSE(first.delta());
  ASSERT_TRUE(reader->Read(&second));
  EXPECT_TRUE(second.delta());
  EXPECT_EQ(second.snapshot().observed_tokens(), 0u);
  c.TryCancel();
  while (reader->Read(&second)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::CANCELLED);

  v1::ResetAttentionSpansResponse reset;
  ASSERT_TRUE(stub->ResetAttentionSpans(&d, {}, &reset).ok());
  EXPECT_EQ(shared_->engine().spans().Snapshot().observed_queries, 0u);
}

TEST_F(ServerTest, RefusesAWatchFasterThanTenTimesASecond) {
  auto stub = v1::AttentionService::NewStub(shared_->channel());
  grpc::ClientContext context;
  v1::WatchAttentionSpansRequest watch;
  watch.mutable_interval()->set_nanos(1);
  auto reader = stub->WatchAttentionSpans(&context, watch);
  v1::WatchAttentionSpansResponse message;
  EXPECT_FALSE(reader->Read(&message));
  EXPECT_EQ(reader->Finish().error_code(), grpc::INVALID_ARGUMENT);
}

TEST_F(ServerTest, HealthKnowsAliveAndReady) {
  EXPECT_EQ(shared_->Health(""), 1);
  EXPECT_EQ(shared_->Health(kInference), 1);
  EXPECT_EQ(shared_->Health("nobody"), -grpc::NOT_FOUND);
}

TEST_F(ServerTest, ServesFourPagesAndNothingElse) {
  EXPECT_EQ(shared_->Get("/health").status, 200);
  EXPECT_EQ(shared_->Get("/version").body.substr(0, 20), "{\"version\":\"0.1.0\",\"");
  EXPECT_EQ(shared_->Get("/metrics").status, 200);
  EXPECT_EQ(shared_->Get("/metrics/attention").status, 200);
  for (const char* path : {"/", "/metrics/", "/etc/passwd", "/../etc/passwd", "/healthz", "/%2e"}) {
    const auto answer = shared_->Get(path);
    EXPECT_THAT(answer.status, ::testing::AnyOf(400, 404)) << path;
  }
  const auto post = shared_->Raw("POST /metrics HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc");
  EXPECT_EQ(post.status, 405);
  EXPECT_THAT(post.head, HasSubstr("Allow: GET, HEAD"));
  const auto head = shared_->Raw("HEAD /health HTTP/1.0\r\n\r\n");
  EXPECT_EQ(head.status, 200);
  EXPECT_EQ(head.body, "");
}

TEST_F(ServerTest, SurvivesWhatIsNotHttp) {
  shared_->Raw("\x16\x03\x01 nonsense\r\n\r\n");
  shared_->Raw(absl::StrCat("GET /", std::string(100000, 'a'), " HTTP/1.0\r\n\r\n"));
  shared_->Raw(absl::StrCat("GET /health HTTP/1.0\r\nX: ", std::string(100000, 'b'), "\r\n\r\n"));
  shared_->Raw("POST /health HTTP/1.0\r\nContent-Length: 99999999999999999999\r\n\r\n");
  EXPECT_EQ(shared_->Get("/health").status, 200);
}

TEST_F(ServerTest, CountsWhatItDid) {
  const double before = shared_->Metric("longspan_generation_tokens_total");
  const std::string ok =
      "longspan_rpc_handled_total{code=\"OK\",method=\"longspan.v1.InferenceService/Complete\"}";
  const double calls = std::max(shared_->Metric(ok), 0.0);
  const double first_tokens =
      std::max(shared_->Metric("longspan_time_to_first_token_seconds_count"), 0.0);
  ASSERT_TRUE(Complete(Prompt("Once upon a time", 9)).ok());
  EXPECT_EQ(shared_->Metric("longspan_generation_tokens_total"), before + 9);
  EXPECT_EQ(shared_->Metric(ok), calls + 1);
  EXPECT_EQ(shared_->Metric("longspan_time_to_first_token_seconds_count"), first_tokens + 1);
  EXPECT_EQ(shared_->Metric("longspan_requests_running"), 0);
  EXPECT_EQ(shared_->Metric("longspan_kv_cache_usage_ratio"), 0);
  EXPECT_GT(shared_->Metric("longspan_op_calls_total{op=\"Attention\"}"), 0);
}

TEST_F(ServerTest, ExportsVllmsNames) {
  const std::string page = shared_->Get("/metrics").body;
  for (const char* name :
       {"vllm:num_requests_running{", "vllm:num_requests_waiting{", "vllm:kv_cache_usage_perc{",
        "vllm:cache_config_info{", "vllm:time_to_first_token_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_bucket{"}) {
    EXPECT_THAT(page, HasSubstr(name));
  }
}

// What `promtool check metrics` says of a page without the vllm: series, whose colons it rejects.
std::string Promtool(const std::string& page) {
  const std::string file = absl::StrCat(testing::TempDir(), "/page");
  std::ofstream out(file);
  for (absl::string_view line : absl::StrSplit(page, '\n')) {
    if (!line.empty() && !absl::StrContains(line, "vllm:")) out << line << "\n";
  }
  out.close();
  FILE* pipe = popen(absl::StrCat("promtool check metrics < ", file, " 2>&1").c_str(), "r");
  std::string said;
  char buffer[4096];
  for (size_t n; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) said.append(buffer, n);
  return pclose(pipe) == 0 && said.empty() ? "" : absl::StrCat(said, "(failed)");
}

TEST_F(ServerTest, PromtoolHasNothingToSayAboutItsPages) {
  if (std::system("command -v promtool >/dev/null") != 0) GTEST_SKIP() << "promtool is not here";
  ASSERT_TRUE(Complete(Prompt("Once upon a time", 40)).ok());
  EXPECT_EQ(Promtool(shared_->Get("/metrics").body), "");
  EXPECT_EQ(Promtool(shared_->Get("/metrics/attention").body), "");
  EXPECT_EQ(Promtool(shared_->Get("/metrics/attention/heads").body), "");
}

TEST_F(ServerTest, ShowsEachHeadOfEachLayerOnItsOwnPageOnly) {
  ASSERT_TRUE(Complete(Prompt("Once upon a time", 40)).ok());
  const std::string attention = shared_->Get("/metrics/attention").body;
  const std::string series = "longspan_attention_span_observations_total{";
  int count = 0;
  for (absl::string_view line : absl::StrSplit(attention, '\n'))
    count += absl::StartsWith(line, series);
  EXPECT_EQ(count, 10 * 6);
  EXPECT_THAT(attention, HasSubstr("layer=\"05\",kind=\"full\",head=\"03\""));
  EXPECT_THAT(attention, HasSubstr("longspan_attention_layer_span_tokens_bucket{"));
  EXPECT_THAT(shared_->Get("/metrics").body, Not(HasSubstr("head=\"")));
  EXPECT_THAT(shared_->Get("/metrics/attention/heads").body,
              HasSubstr("longspan_attention_entropy_normalized_total{layer=\"05\",kind=\"full\""));
}

// Tests below change the server's state and have one of their own.

TEST(ServerLife, RefusesAFullQueueWithWhenToComeAgain) {
  ServerConfig config = TestConfig();
  config.max_running = 1;
  config.max_queued_requests = 1;
  TestServer server(config);
  auto stub = server.inference();
  LongRequest running(*stub, "running");
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  grpc::Status refused;
  std::string pushback;
  std::thread waiting([&] {  // fills the queue until it is cancelled
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
    v1::CompleteResponse response;
    stub->Complete(&context, Prompt("Once", 4), &response);
  });
  for (int i = 0; i < 100 && server.engine().Stats().queued == 0; ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  grpc::ClientContext context;
  v1::CompleteResponse response;
  refused = stub->Complete(&context, Prompt("Once", 4), &response);
  EXPECT_EQ(refused.error_code(), grpc::RESOURCE_EXHAUSTED);
  EXPECT_EQ(DetailOf<google::rpc::ErrorInfo>(refused).reason(), "QUEUE_FULL");
  EXPECT_TRUE(DetailOf<google::rpc::RetryInfo>(refused).has_retry_delay());
  EXPECT_EQ(context.GetServerTrailingMetadata().count("grpc-retry-pushback-ms"), 1u);
  running.Cancel();
  waiting.join();
}

TEST(ServerLife, RefusesAtOnceWhatCanNeverFit) {
  ServerConfig config = TestConfig();
  config.cache_bytes = 8 << 20;
  TestServer server(config);
  grpc::ClientContext context;
  v1::CompleteResponse response;
  const grpc::Status status =
      server.inference()->Complete(&context, Prompt("Once", 16000), &response);
  EXPECT_EQ(status.error_code(), grpc::RESOURCE_EXHAUSTED);
  EXPECT_EQ(DetailOf<google::rpc::ErrorInfo>(status).reason(), "NEVER_FITS");
  EXPECT_THAT(status.error_message(), HasSubstr("bytes"));
}

TEST(ServerLife, AReaderThatStopsIsCutOffAndSlowsNobody) {
  ServerConfig config = TestConfig();
  config.stall_timeout = absl::Milliseconds(300);
  TestServer server(config);
  grpc::ChannelArguments narrow;  // a few KiB fill the windows
  narrow.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 5);
  narrow.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  auto stopped = v1::InferenceService::NewStub(server.NewChannel(narrow));
  v1::StreamCompleteRequest request;
  *request.mutable_request() = Prompt("Once upon a time", 4000);
  request.mutable_request()->mutable_output()->set_logprobs(20);
  request.mutable_request()->mutable_sampling()->set_n(4);
  grpc::ClientContext context;
  auto reader = stopped->StreamComplete(&context, request);

  auto stub = server.inference();
  for (int i = 0; i < 3; ++i) {  // others go on meanwhile
    grpc::ClientContext other;
    other.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::CompleteResponse response;
    EXPECT_TRUE(stub->Complete(&other, Prompt("Once", 4), &response).ok());
  }
  EXPECT_TRUE(server.engine().WaitIdle(absl::Seconds(20)));  // freed although nothing was read
  v1::StreamCompleteResponse message;
  while (reader->Read(&message)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::RESOURCE_EXHAUSTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("300ms"));
}

// 800 KB take most of a second to tokenize, and gRPC has but a few threads.
TEST(ServerLife, LongPromptsDoNotDelayOtherCalls) {
  TestServer server;
  auto stub = server.inference();
  std::string text;
  for (int i = 0; i < 160'000; ++i) text += "word ";
  constexpr int kLong = 6;
  std::vector<grpc::Status> refused(kLong);
  std::vector<std::thread> clients;
  std::atomic<int> answered{0};
  for (int i = 0; i < kLong; ++i) {
    clients.emplace_back([&, i] {
      const auto channel = server.NewChannel();
      const auto inference = v1::InferenceService::NewStub(channel);
      grpc::ClientContext context;
      v1::CompleteResponse response;
      if (i % 3 == 0) {
        v1::TokenizeRequest request;
        request.set_text(text);
        v1::TokenizeResponse tokens;
        refused[i] = inference->Tokenize(&context, request, &tokens);
      } else if (i % 3 == 1) {
        refused[i] = inference->Complete(&context, Prompt(text, 1), &response);
      } else {
        v1::StreamCompleteRequest request;
        *request.mutable_request() = Prompt(text, 1);
        v1::StreamCompleteResponse message;
        auto reader = inference->StreamComplete(&context, request);
        while (reader->Read(&message)) {
        }
        refused[i] = reader->Finish();
      }
      ++answered;
    });
  }
  absl::SleepFor(absl::Milliseconds(200));  // they have come
  const absl::Time begin = absl::Now();
  EXPECT_EQ(server.Health(""), 1);
  grpc::ClientContext context;
  v1::CompleteResponse response;
  EXPECT_TRUE(stub->Complete(&context, Prompt("Once", 1), &response).ok());
  EXPECT_LT(absl::Now() - begin, absl::Milliseconds(500));
  EXPECT_LT(answered, kLong);  // meanwhile
  for (std::thread& client : clients) client.join();
  for (int i = 0; i < kLong; ++i) {
    EXPECT_EQ(refused[i].error_code(), i % 3 == 0 ? grpc::OK : grpc::INVALID_ARGUMENT)
        << refused[i].error_message();
  }
}

TEST(ServerLife, CallsThatLeaveBeforeTheirLongPromptIsReadLeaveNothing) {
  TestServer server;
  auto stub = server.inference();
  std::string text;
  for (int i = 0; i < 10'000; ++i) text += "word ";  // fits the context
  for (int round = 0; round < 20; ++round) {
    grpc::ClientContext unary, stream;
    for (auto* context : {&unary, &stream}) {
      context->set_deadline(std::chrono::system_clock::now() +
                            std::chrono::milliseconds(10 * round));
    }
    v1::CompleteResponse response;
    EXPECT_EQ(stub->Complete(&unary, Prompt(text, 1000), &response).error_code(),
              grpc::DEADLINE_EXCEEDED);
    v1::StreamCompleteRequest request;
    *request.mutable_request() = Prompt(text, 1000);
    v1::StreamCompleteResponse message;
    auto reader = stub->StreamComplete(&stream, request);
    reader->Read(&message);
    stream.TryCancel();
    EXPECT_FALSE(reader->Finish().ok());
  }
}

// Clients look for UNIMPLEMENTED to try an older version of a service.
TEST(ServerLife, MethodsThatAreNotThereAreUnimplementedAndShareOneSeries) {
  TestServer server;
  for (const char* method : {"/longspan.v1.InferenceService/Nothing", "/x.Y/z",
                             "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"}) {
    std::string response;
    EXPECT_EQ(CallRaw(server.channel(), method, "", &response).error_code(), grpc::UNIMPLEMENTED)
        << method;
  }
  EXPECT_EQ(server.Metric("longspan_rpc_handled_total{code=\"UNIMPLEMENTED\",method=\"unknown\"}"),
            3);
  EXPECT_THAT(server.Get("/metrics").body, Not(HasSubstr("x.Y")));
}

TEST(ServerLife, DrainRefusesNewRequestsFinishesAcceptedOnesAndCanBeTakenBack) {
  TestServer server;
  auto stub = server.inference();
  auto admin = v1::AdminService::NewStub(server.channel());
  auto accepted = std::make_unique<LongRequest>(*stub, "accepted");
  grpc::ClientContext context;
  auto reader = admin->Drain(&context, {});
  v1::DrainResponse progress;
  ASSERT_TRUE(reader->Read(&progress));
  EXPECT_FALSE(progress.done());
  EXPECT_EQ(progress.running_requests(), 1u);
  EXPECT_EQ(server.Health(kInference), 2);
  EXPECT_EQ(server.Health(""), 1);
  EXPECT_EQ(server.Get("/health").status, 503);
  grpc::ClientContext late;
  v1::CompleteResponse response;
  EXPECT_EQ(stub->Complete(&late, Prompt("Once", 1), &response).error_code(), grpc::UNAVAILABLE);
  grpc::ClientContext needles;
  v1::RunNeedleRequest run;
  run.add_context_lengths(256);
  run.add_depth_percents(50);
  v1::RunNeedleResponse cell;
  auto cells = v1::NeedleService::NewStub(server.channel())->RunNeedle(&needles, run);
  EXPECT_FALSE(cells->Read(&cell));
  EXPECT_EQ(cells->Finish().error_code(), grpc::UNAVAILABLE);
  accepted->Cancel();
  while (reader->Read(&progress)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_TRUE(progress.done());
  grpc::ClientContext again, after;
  v1::ResumeResponse resumed;
  ASSERT_TRUE(admin->Resume(&again, {}, &resumed).ok());
  EXPECT_EQ(server.Health(kInference), 1);
  EXPECT_EQ(server.Get("/health").status, 200);
  EXPECT_TRUE(stub->Complete(&after, Prompt("Once", 1), &response).ok());
}

TEST(ServerLife, DrainWithAGraceAbortsTheRestAsUnavailable) {
  TestServer server;
  auto stub = server.inference();
  auto admin = v1::AdminService::NewStub(server.channel());
  LongRequest accepted(*stub, "accepted");
  grpc::ClientContext context;
  v1::DrainRequest request;
  request.mutable_grace()->set_nanos(200'000'000);
  request.set_shutdown(true);
  auto reader = admin->Drain(&context, request);
  v1::DrainResponse progress;
  while (reader->Read(&progress)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(accepted.Rest().error_code(), grpc::UNAVAILABLE);
  for (int i = 0; i < 100 && !server.shutdown_requested(); ++i) {
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_TRUE(server.shutdown_requested());
}

TEST(ServerLife, StopsInTheOrderOfSigterm) {
  ServerConfig config = TestConfig();
  config.withdrawal_grace = absl::Milliseconds(400);
  config.shutdown_timeout = absl::Milliseconds(300);
  TestServer server(config);
  auto stub = server.inference();
  LongRequest accepted(*stub, "accepted");
  int aborted = -1;
  std::thread stop([&] { aborted = server.server().DrainAndStop(); });
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(server.Health(kInference), 2);  // not ready at once
  EXPECT_EQ(server.Get("/health").status, 503);
  grpc::ClientContext in_grace, late;
  v1::CompleteResponse response;
  EXPECT_TRUE(stub->Complete(&in_grace, Prompt("Once", 1), &response).ok());  // still taken
  absl::SleepFor(absl::Milliseconds(400));
  EXPECT_EQ(stub->Complete(&late, Prompt("Once", 1), &response).error_code(), grpc::UNAVAILABLE);
  grpc::ClientContext too_late;
  v1::ResumeResponse resumed;
  const grpc::Status resume =
      v1::AdminService::NewStub(server.channel())->Resume(&too_late, {}, &resumed);
  EXPECT_EQ(resume.error_code(), grpc::FAILED_PRECONDITION);
  EXPECT_EQ(resume.error_message(), "the server is shutting down");
  EXPECT_EQ(server.Health(kInference), 2);
  stop.join();
  EXPECT_EQ(aborted, 1);
  EXPECT_EQ(accepted.Rest().error_code(), grpc::UNAVAILABLE);
}

TEST(ServerLife, StartsInUnderTwoSecondsOnTheDefaultModel) {
  const absl::Time begin = absl::Now();
  TestServer server;
#if defined(NDEBUG) && !defined(LONGSPAN_SANITIZED)
  EXPECT_LT(absl::Now() - begin, absl::Seconds(2));
#else
  EXPECT_LT(absl::Now() - begin, absl::Seconds(8));
#endif
}

TEST(ServerLife, SaysWhatItCannotStartWith) {
  const auto Refusal = [](auto change) {
    ServerConfig config = TestConfig();
    change(config);
    auto server = Server::Start(config, [] {});
    return server.ok() ? "started" : std::string(server.status().message());
  };
  EXPECT_THAT(Refusal([](auto& c) { c.model = "/nowhere"; }), HasSubstr("/nowhere"));
  EXPECT_THAT(Refusal([](auto& c) { c.device = "tpu"; }), HasSubstr("--device is 'tpu'"));
  EXPECT_THAT(Refusal([](auto& c) { c.device = "cuda:x"; }), HasSubstr("cuda:x"));
  EXPECT_THAT(Refusal([](auto& c) { c.device = "cuda:0", c.kv_dtype = "q8_0"; }),
              HasSubstr("--kv-dtype q8_0: --device cuda:0 "));
  EXPECT_THAT(Refusal([](auto& c) { c.cache_bytes = 1; }), HasSubstr("1"));
  for (const char* address : {"127.0.0.1:99999", "127.0.0.1:-1", "127.0.0.1:", "nonsense"}) {
    for (auto field : {&ServerConfig::grpc, &ServerConfig::http}) {
      EXPECT_THAT(Refusal([&](auto& c) { c.*field = address; }),
                  HasSubstr(absl::StrCat("is '", address, "', must be HOST:PORT")));
    }
  }
  EXPECT_THAT(Refusal([](auto& c) { c.grpc = "256.0.0.1:1", c.insecure = true; }),
              HasSubstr("256.0.0.1:1"));
}

TEST(ServerLife, KeepsKeysAndValuesInEightBitsWhereAsked) {
  ServerConfig config = TestConfig();
  config.kv_dtype = "q8_0";
  TestServer server(config);
  auto stub = server.inference();
  grpc::ClientContext context;
  v1::CompleteResponse response;
  ASSERT_TRUE(stub->Complete(&context, Prompt("Once upon a time", 12), &response).ok());
  EXPECT_EQ(response.usage().completion_tokens(), 12u);
  // A ring of 64 that is full: 5 pages of 16 tokens in each of 5 layers, keys and values of 2 heads
  // of two blocks.
  constexpr double kRing = 5 * 16 * 5 * 2 * 2 * 2 * 34;
  LongRequest request(*stub, "long");
  const absl::Time limit = absl::Now() + absl::Seconds(5);
  double used = 0;
  while ((used = server.Metric("longspan_kv_used_bytes{kind=\"ring\"}")) != kRing) {
    ASSERT_LT(absl::Now(), limit) << used;
  }
  request.Cancel();
  EXPECT_EQ(request.Rest().error_code(), grpc::CANCELLED);
}

TEST(ServerLife, AttentionOffComputesAndShowsNone) {
  ServerConfig config = TestConfig();
  config.attention_metrics = "off";
  config.metrics_compat = "none";
  TestServer server(config);
  auto stub = v1::AttentionService::NewStub(server.channel());
  grpc::ClientContext context;
  v1::GetAttentionSpansResponse response;
  EXPECT_EQ(stub->GetAttentionSpans(&context, {}, &response).error_code(),
            grpc::FAILED_PRECONDITION);
  EXPECT_EQ(server.Get("/metrics/attention").body, "");
  EXPECT_THAT(server.Get("/metrics").body, Not(HasSubstr("longspan_attention")));
  EXPECT_THAT(server.Get("/metrics").body, Not(HasSubstr("vllm:")));
}

}  // namespace
}  // namespace longspan
