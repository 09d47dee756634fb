// NeedleService in a whole server in this process, with the default model.
#include "server/needle_service.h"

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "longspan/v1/needle.grpc.pb.h"
#include "server/server.h"

namespace longspan {
namespace {

class NeedleServiceTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    ServerConfig config;
    config.grpc = "127.0.0.1:0";
    config.http = "";
    config.max_context = 4096;
    auto started = Server::Start(config, [] {});
    ASSERT_TRUE(started.ok()) << started.status();
    server_ = std::move(*started).release();
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }
  void SetUp() override {
    stub_ = v1::NeedleService::NewStub(grpc::CreateChannel(
        absl::StrCat("127.0.0.1:", server_->grpc_port()), grpc::InsecureChannelCredentials()));
  }
  void TearDown() override {
    EXPECT_TRUE(server_->engine().WaitIdle(absl::Seconds(20)));
    EXPECT_TRUE(server_->engine().CheckIntegrity().ok());
  }

  static v1::RunNeedleRequest Small(const std::string& id = "") {
    v1::RunNeedleRequest request;
    request.add_context_lengths(256);
    request.add_context_lengths(320);
    request.add_depth_percents(0);
    request.add_depth_percents(50);
    request.set_run_id(id);
    return request;
  }
  // Long enough to be caught on the way.
  static v1::RunNeedleRequest Long(const std::string& id) {
    v1::RunNeedleRequest request = Small(id);
    request.set_trials(1000);
    request.set_concurrency(2);
    return request;
  }
  std::vector<v1::RunNeedleResponse> Run(const v1::RunNeedleRequest& request,
                                         grpc::Status* status = nullptr) {
    grpc::ClientContext context;
    auto reader = stub_->RunNeedle(&context, request);
    std::vector<v1::RunNeedleResponse> events;
    for (v1::RunNeedleResponse event; reader->Read(&event);) events.push_back(event);
    const grpc::Status end = reader->Finish();
    if (status != nullptr) {
      *status = end;
    } else {
      EXPECT_TRUE(end.ok()) << end.error_message();
    }
    return events;
  }
  // Reads until a cell has come, then leaves.
  void WatchOneCell(const v1::RunNeedleRequest& request) {
    grpc::ClientContext context;
    auto reader = stub_->RunNeedle(&context, request);
    v1::RunNeedleResponse event;
    while (reader->Read(&event) && !event.has_cell()) {
    }
    EXPECT_TRUE(event.has_cell());
    context.TryCancel();
    reader->Finish();
  }
  v1::NeedleRun Get(const std::string& id) {
    grpc::ClientContext context;
    v1::GetNeedleRunRequest request;
    v1::GetNeedleRunResponse response;
    request.set_run_id(id);
    const grpc::Status status = stub_->GetNeedleRun(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.run();
  }
  v1::NeedleRunState Cancel(const std::string& id) {
    grpc::ClientContext context;
    v1::CancelNeedleRunRequest request;
    v1::CancelNeedleRunResponse response;
    request.set_run_id(id);
    EXPECT_TRUE(stub_->CancelNeedleRun(&context, request, &response).ok());
    return response.state();
  }
  v1::NeedleRunState StateAfter(const std::string& id, absl::Duration most) {
    const absl::Time limit = absl::Now() + most;
    v1::NeedleRunState state = Get(id).summary().state();
    while (state == v1::NEEDLE_RUN_STATE_RUNNING && absl::Now() < limit) {
      absl::SleepFor(absl::Milliseconds(10));
      state = Get(id).summary().state();
    }
    return state;
  }

  static Server* server_;
  std::unique_ptr<v1::NeedleService::Stub> stub_;
};
Server* NeedleServiceTest::server_ = nullptr;

TEST_F(NeedleServiceTest, StreamsStartedThenEachCellOnceThenFinished) {
  v1::RunNeedleRequest request = Small();
  request.set_record_attention_spans(true);
  const auto events = Run(request);
  ASSERT_GE(events.size(), 6u);
  EXPECT_EQ(events.front().started().total_cells(), 4u);
  std::set<std::pair<uint32_t, uint32_t>> cells;
  for (size_t i = 0; i < events.size(); ++i) {
    EXPECT_EQ(events[i].sequence(), i + 1);
    if (!events[i].has_cell()) continue;
    const v1::NeedleCell& cell = events[i].cell();
    EXPECT_TRUE(cells.insert({cell.length_index(), cell.depth_index()}).second);
    EXPECT_EQ(cell.error(), "");
    EXPECT_GT(cell.needle_token_end(), cell.needle_token_begin());
    EXPECT_LT(cell.needle_token_end(), cell.prompt_tokens());
    EXPECT_LT(cell.prompt_tokens(), cell.context_length());
    ASSERT_EQ(cell.layers_size(), 10);
    for (const v1::LayerNeedleMass& layer : cell.layers()) {
      ASSERT_EQ(layer.head_mass_size(), 6);
      for (const float mass : layer.head_mass()) {
        EXPECT_GE(mass, 0);
        EXPECT_LE(mass, 1.0001f);  // sums of fp32 probabilities
      }
    }
  }
  EXPECT_EQ(cells.size(), 4u);
  ASSERT_TRUE(events.back().has_finished());
  EXPECT_EQ(events.back().finished().state(), v1::NEEDLE_RUN_STATE_SUCCEEDED);
  EXPECT_EQ(events.back().finished().score_by_length_size(), 2);
}

TEST_F(NeedleServiceTest, RepeatsAFinishedRunsEventsToWhoeverAttaches) {
  const auto first = Run(Small("again"));
  const auto second = Run(Small("again"));
  v1::RunNeedleRequest by_id;
  by_id.set_run_id("again");
  const auto third = Run(by_id);
  ASSERT_EQ(first.size(), second.size());
  ASSERT_EQ(first.size(), third.size());
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(first[i].SerializeAsString(), second[i].SerializeAsString());
    EXPECT_EQ(first[i].SerializeAsString(), third[i].SerializeAsString());
  }
}

TEST_F(NeedleServiceTest, RefusesAnotherGridUnderAKnownId) {
  Run(Small("taken"));
  v1::RunNeedleRequest other = Small("taken");
  other.set_seed(77);
  grpc::Status status;
  Run(other, &status);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(NeedleServiceTest, CancelsARunWhoseClientLeaves) {
  WatchOneCell(Long("left"));
  EXPECT_EQ(StateAfter("left", absl::Seconds(20)), v1::NEEDLE_RUN_STATE_CANCELLED);
}

TEST_F(NeedleServiceTest, GoesOnWithADetachedRunWhenItsClientLeaves) {
  v1::RunNeedleRequest request = Small("detached");
  request.set_trials(4);
  request.set_detach(true);
  WatchOneCell(request);
  EXPECT_EQ(StateAfter("detached", absl::Seconds(60)), v1::NEEDLE_RUN_STATE_SUCCEEDED);
  EXPECT_EQ(Get("detached").cells_size(), 16);
}

TEST_F(NeedleServiceTest, CancelEndsARunAndItsStreams) {
  v1::RunNeedleRequest request = Long("stopped");
  request.set_detach(true);
  grpc::ClientContext context;
  auto reader = stub_->RunNeedle(&context, request);
  v1::RunNeedleResponse event;
  ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(Cancel("stopped"), v1::NEEDLE_RUN_STATE_CANCELLED);
  while (reader->Read(&event)) {
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(event.finished().state(), v1::NEEDLE_RUN_STATE_CANCELLED);
}

TEST_F(NeedleServiceTest, LeavesOutTheCellsThatAResumingClientHas) {
  v1::RunNeedleRequest request = Small();
  v1::NeedleCellKey* skip = request.add_skip_cells();
  skip->set_length_index(1);
  skip->set_depth_index(0);
  int cells = 0;
  for (const auto& event : Run(request)) {
    if (!event.has_cell()) continue;
    ++cells;
    EXPECT_FALSE(event.cell().length_index() == 1 && event.cell().depth_index() == 0);
  }
  EXPECT_EQ(cells, 3);
}

TEST_F(NeedleServiceTest, ListsRunsByPage) {
  Run(Small("page-1"));
  Run(Small("page-2"));
  Run(Small("page-3"));
  std::vector<std::string> ids;
  v1::ListNeedleRunsRequest request;
  request.set_page_size(2);
  for (int pages = 0; pages < 40; ++pages) {
    grpc::ClientContext context;
    v1::ListNeedleRunsResponse response;
    ASSERT_TRUE(stub_->ListNeedleRuns(&context, request, &response).ok());
    EXPECT_LE(response.items_size(), 2);
    for (const v1::NeedleRun& run : response.items()) {
      ids.push_back(run.run_id());
      EXPECT_EQ(run.cells_size(), 0);
    }
    if (response.next_page_token().empty()) break;
    request.set_page_token(response.next_page_token());
  }
  for (const char* id : {"page-1", "page-2", "page-3"}) {
    EXPECT_EQ(std::count(ids.begin(), ids.end(), id), 1) << id;
  }
}

struct BadRun {
  const char* says;
  std::function<void(v1::RunNeedleRequest&)> spoil;
};

TEST_F(NeedleServiceTest, RefusesEachBadFieldWithValueAndLimit) {
  const std::vector<BadRun> cases = {
      {"context_lengths: is empty", [](auto& r) { r.clear_context_lengths(); }},
      {"context_lengths: has 5000, the model's context is 4096",
       [](auto& r) { r.add_context_lengths(5000); }},
      {"context_lengths: context length 20 is too short",
       [](auto& r) { r.add_context_lengths(20); }},
      {"depth_percents: is empty", [](auto& r) { r.clear_depth_percents(); }},
      {"depth_percents: has 101", [](auto& r) { r.add_depth_percents(101); }},
      {"depth_percents: has nan",
       [](auto& r) { r.add_depth_percents(std::numeric_limits<float>::quiet_NaN()); }},
      {"trials: is 1025, which makes 4100 cells", [](auto& r) { r.set_trials(1025); }},
      {"task: is 9", [](auto& r) { r.set_task(static_cast<v1::NeedleTask>(9)); }},
      {"haystack: is 9", [](auto& r) { r.set_haystack(static_cast<v1::HaystackKind>(9)); }},
      {"haystack_text: holds no text", [](auto& r) { r.set_haystack_text(" \n"); }},
      {"haystack_text: has 5242880 bytes, the limit is 4194304",
       [](auto& r) { r.set_haystack_text(std::string(5 << 20, 'a')); }},
      {"num_keys: is 2", [](auto& r) { r.set_num_keys(2); }},
      {"num_values: is 17",
       [](auto& r) {
         r.set_task(v1::NEEDLE_TASK_MULTI_VALUE);
         r.set_num_values(17);
       }},
      {"concurrency: is 1000, the limit is 256", [](auto& r) { r.set_concurrency(1000); }},
      {"sampling.n: is 2", [](auto& r) { r.mutable_sampling()->set_n(2); }},
      {"sampling.temperature", [](auto& r) { r.mutable_sampling()->set_temperature(-1); }},
      {"skip_cells: cell (9, 0, 0)", [](auto& r) { r.add_skip_cells()->set_length_index(9); }},
      {"run_id: may hold", [](auto& r) { r.set_run_id("../../etc"); }},
  };
  for (const BadRun& bad : cases) {
    v1::RunNeedleRequest request = Small();
    bad.spoil(request);
    grpc::Status status;
    EXPECT_TRUE(Run(request, &status).empty()) << bad.says;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << bad.says;
    EXPECT_NE(status.error_message().find(bad.says), std::string::npos)
        << bad.says << " / " << status.error_message();
  }
  v1::RunNeedleRequest unknown;
  unknown.set_run_id("never-heard-of");
  grpc::Status status;
  Run(unknown, &status);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(NeedleServiceTest, HidesNeedlesInACallersOwnText) {
  v1::RunNeedleRequest request = Small();
  request.set_haystack_text(
      "The cat sat on the mat. It was a fine day in the village. Nobody came.");
  const auto events = Run(request);
  ASSERT_TRUE(events.back().has_finished());
  EXPECT_EQ(events.back().finished().failed_cells(), 0u);
}

}  // namespace
}  // namespace longspan
