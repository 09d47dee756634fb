#include "server/attention_service.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/answer.h"
#include "server/span_proto.h"
#include "server/status.h"

namespace longspan {
namespace {

constexpr absl::Duration kShortestInterval = absl::Milliseconds(100);

absl::Status Check(const v1::SpanFilter& filter, const Frontend& frontend) {
  if (absl::Status s = CheckModel(filter.model(), frontend.conversion); !s.ok()) return s;
  const size_t layers = frontend.conversion.spec->layers.size();
  for (uint32_t layer : filter.layers()) {
    if (layer >= layers) {
      return absl::InvalidArgumentError(
          absl::StrCat("filter.layers: layer ", layer, " is not one of the model's ", layers));
    }
  }
  if (!filter.request_id().empty()) {
    return absl::InvalidArgumentError(
        "filter.request_id: a request's own spans come with its response: set "
        "output.return_attention_spans");
  }
  if (frontend.engine.options().spans == SpanLevel::kOff) {
    return absl::FailedPreconditionError(
        "attention metrics are off; start with "
        "--attention-metrics layer or head");
  }
  return absl::OkStatus();
}

std::vector<uint32_t> LayersOf(const v1::SpanFilter& filter) {
  return {filter.layers().begin(), filter.layers().end()};
}

// The first message is the totals, each later one what came since the last. A timer starts each
// write; the end comes from the client or from the server's shutdown.
class Watch : public grpc::ServerWriteReactor<v1::WatchAttentionSpansResponse> {
 public:
  Watch(const Frontend& frontend, grpc::CallbackServerContext* context,
        const v1::WatchAttentionSpansRequest& request)
      : frontend_(frontend), context_(context), layers_(LayersOf(request.filter())) {
    absl::Status status = frontend.Authenticate(*context, Role::kUser).status();
    if (status.ok()) status = Check(request.filter(), frontend);
    if (request.has_interval()) {
      interval_ = absl::Seconds(request.interval().seconds()) +
                  absl::Nanoseconds(request.interval().nanos());
      if (status.ok() && (interval_ < kShortestInterval || interval_ > absl::Hours(1))) {
        status = absl::InvalidArgumentError(absl::StrCat(
            "interval: is ", absl::FormatDuration(interval_), ", must be from 100ms to 1h"));
      }
    }
    if (!status.ok()) {
      Finish(ToGrpc(status, context));
      return;
    }
    last_ = frontend_.engine.spans().Snapshot();
    *response_.mutable_snapshot() = ToProto(last_, *frontend_.conversion.spec, layers_);
    stream_ = frontend_.watchdog.Add([this] { context_->TryCancel(); });
    Write();
  }

 private:
  void Write() {
    frontend_.watchdog.WriteBegan(stream_);
    StartWrite(&response_);
  }
  void OnWriteDone(bool ok) override {
    frontend_.watchdog.WriteEnded(stream_);
    if (!ok) {
      Finish(grpc::Status::CANCELLED);
      return;
    }
    alarm_.Set(std::chrono::system_clock::now() + absl::ToChronoMilliseconds(interval_),
               [this](bool fired) { OnAlarm(fired); });
    if (cancelled_.load()) alarm_.Cancel();
  }
  void OnAlarm(bool fired) {
    if (!fired || cancelled_.load()) {
      Finish(grpc::Status::CANCELLED);
      return;
    }
    SpanSnapshot now = frontend_.engine.spans().Snapshot();
    *response_.mutable_snapshot() =
        ToProto(Difference(now, last_), *frontend_.conversion.spec, layers_);
    response_.set_delta(true);
    last_ = std::move(now);
    Write();
  }
  void OnCancel() override {
    cancelled_.store(true);
    alarm_.Cancel();
  }
  void OnDone() override {
    if (stream_ != 0) frontend_.watchdog.Remove(stream_);
    delete this;
  }

  const Frontend& frontend_;
  grpc::CallbackServerContext* const context_;
  const std::vector<uint32_t> layers_;
  uint64_t stream_ = 0;
  absl::Duration interval_ = absl::Seconds(1);
  SpanSnapshot last_;
  v1::WatchAttentionSpansResponse response_;
  grpc::Alarm alarm_;
  std::atomic<bool> cancelled_{false};
};

class AttentionServiceImpl final : public v1::AttentionService::CallbackService {
 public:
  explicit AttentionServiceImpl(const Frontend& frontend) : f_(frontend) {}

  grpc::ServerUnaryReactor* GetAttentionSpans(grpc::CallbackServerContext* context,
                                              const v1::GetAttentionSpansRequest* request,
                                              v1::GetAttentionSpansResponse* response) override {
    return Answer(f_, context, Role::kUser, [&](const Caller&) -> absl::Status {
      if (absl::Status s = Check(request->filter(), f_); !s.ok()) return s;
      *response->mutable_snapshot() =
          ToProto(f_.engine.spans().Snapshot(), *f_.conversion.spec, LayersOf(request->filter()));
      return absl::OkStatus();
    });
  }

  grpc::ServerWriteReactor<v1::WatchAttentionSpansResponse>* WatchAttentionSpans(
      grpc::CallbackServerContext* context,
      const v1::WatchAttentionSpansRequest* request) override {
    return new Watch(f_, context, *request);
  }

  grpc::ServerUnaryReactor* ResetAttentionSpans(grpc::CallbackServerContext* context,
                                                const v1::ResetAttentionSpansRequest*,
                                                v1::ResetAttentionSpansResponse*) override {
    return Answer(f_, context, Role::kAdmin, [&](const Caller&) {
      f_.engine.spans().Reset();
      return absl::OkStatus();
    });
  }

 private:
  const Frontend& f_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeAttentionService(const Frontend& frontend) {
  return std::make_unique<AttentionServiceImpl>(frontend);
}

}  // namespace longspan
