#include "server/admin_service.h"

#include <grpcpp/alarm.h>

#include <atomic>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "server/answer.h"
#include "server/span_proto.h"
#include "server/status.h"
#include "server/version.h"

namespace longspan {
namespace {

v1::Model Describe(const Frontend& f) {
  const LoadedModel& loaded = f.engine.model();
  const ModelSpec& spec = loaded.model->spec();
  v1::Model model;
  model.set_id(f.conversion.model_names.front());
  for (size_t i = 1; i < f.conversion.model_names.size(); ++i) {
    model.add_aliases(f.conversion.model_names[i]);
  }
  model.set_root(f.model_path);
  model.set_architecture(spec.family);
  model.set_max_model_len(f.conversion.max_context);
  model.set_vocab_size(spec.vocab);
  model.set_num_parameters(spec.parameters());
  model.set_dtype(Info(spec.weight_dtype).name);
  for (size_t l = 0; l < spec.layers.size(); ++l) {
    v1::LayerInfo* layer = model.add_layers();
    layer->set_layer(static_cast<uint32_t>(l));
    layer->set_kind(KindOf(spec.layers[l]));
    layer->set_window_tokens(WindowOf(spec.layers[l]));
    if (const auto* a = std::get_if<AttentionSpec>(&spec.layers[l].mixer)) {
      layer->set_num_heads(a->heads);
      layer->set_num_kv_heads(a->kv_heads);
      layer->set_head_dim(a->head_dim);
    }
  }
  for (int eos : loaded.tokenizer->eos()) model.add_eos_token_ids(eos);
  if (loaded.tokenizer->bos() >= 0) model.set_bos_token_id(loaded.tokenizer->bos());
  model.set_tokenizer(loaded.tokenizer->kind());
  model.set_has_chat_template(loaded.chat_template != nullptr);
  return model;
}

class ModelServiceImpl final : public v1::ModelService::CallbackService {
 public:
  explicit ModelServiceImpl(const Frontend& frontend) : f_(frontend) {}

  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const v1::GetModelRequest* request,
                                     v1::GetModelResponse* response) override {
    return Answer(f_, context, Role::kUser, [&](const Caller&) -> absl::Status {
      if (absl::Status s = CheckModel(request->id(), f_.conversion); !s.ok()) return s;
      *response->mutable_model() = Describe(f_);
      return absl::OkStatus();
    });
  }

  // One model is served, so there is one page.
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const v1::ListModelsRequest* request,
                                       v1::ListModelsResponse* response) override {
    return Answer(f_, context, Role::kUser, [&](const Caller&) -> absl::Status {
      if (!request->page_token().empty()) {
        return absl::InvalidArgumentError("page_token: is not one that was given out");
      }
      *response->add_items() = Describe(f_);
      return absl::OkStatus();
    });
  }

 private:
  const Frontend& f_;
};

// Reports what remains, every 100 ms, until nothing does.
class DrainCall : public grpc::ServerWriteReactor<v1::DrainResponse> {
 public:
  DrainCall(const Frontend& frontend, grpc::CallbackServerContext* context,
            const v1::DrainRequest& request)
      : frontend_(frontend), shutdown_(request.shutdown()) {
    if (auto caller = frontend.Authenticate(*context, Role::kAdmin); !caller.ok()) {
      Finish(ToGrpc(caller.status(), context));
      return;
    }
    if (request.has_grace()) {
      const absl::Duration grace =
          absl::Seconds(request.grace().seconds()) + absl::Nanoseconds(request.grace().nanos());
      if (grace < absl::ZeroDuration()) {
        Finish(ToGrpc(absl::InvalidArgumentError(absl::StrCat(
                          "grace: is ", absl::FormatDuration(grace), ", must not be negative")),
                      context));
        return;
      }
      until_ = absl::Now() + grace;
    }
    frontend_.drain();
    stream_ = frontend_.watchdog.Add([context] { context->TryCancel(); });
    Report();
  }

 private:
  void Report() {
    if (absl::Now() >= until_) {
      frontend_.engine.CancelAll(absl::UnavailableError("the server was drained"));
      until_ = absl::InfiniteFuture();
    }
    const EngineStats stats = frontend_.engine.Stats();
    response_.set_running_requests(stats.running);
    response_.set_queued_requests(stats.queued);
    response_.set_done(frontend_.engine.Idle());
    frontend_.watchdog.WriteBegan(stream_);
    StartWrite(&response_);
  }
  void OnWriteDone(bool ok) override {
    frontend_.watchdog.WriteEnded(stream_);
    if (!ok) return Leave();
    if (response_.done()) {
      if (shutdown_) frontend_.request_shutdown();
      return Finish(grpc::Status::OK);
    }
    alarm_.Set(std::chrono::system_clock::now() + std::chrono::milliseconds(100),
               [this](bool fired) {
                 if (!fired || cancelled_.load()) return Leave();
                 Report();
               });
    if (cancelled_.load()) alarm_.Cancel();
  }
  // Whoever asked no longer listens; what was asked for goes on.
  void Leave() {
    if (shutdown_) frontend_.request_shutdown();
    Finish(grpc::Status::CANCELLED);
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
  const bool shutdown_;
  uint64_t stream_ = 0;
  absl::Time until_ = absl::InfiniteFuture();
  v1::DrainResponse response_;
  grpc::Alarm alarm_;
  std::atomic<bool> cancelled_{false};
};

class AdminServiceImpl final : public v1::AdminService::CallbackService {
 public:
  explicit AdminServiceImpl(const Frontend& frontend) : f_(frontend) {}

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest*,
                                          v1::GetServerInfoResponse* response) override {
    return Answer(f_, context, Role::kAdmin, [&](const Caller&) {
      const EngineOptions& options = f_.engine.options();
      response->set_version(kVersion);
      response->set_git_commit(kGitCommit);
      response->set_instance_id(f_.instance_id);
      response->set_device(f_.device);
      response->set_uptime_seconds(absl::ToInt64Seconds(absl::Now() - f_.started));
      response->set_kv_block_size(options.page_tokens);
      response->set_total_kv_blocks(f_.engine.Stats().cache.paged_pages_total);
      response->set_max_running_requests(options.limits.max_running);
      response->set_max_batched_tokens(options.limits.max_batched_tokens);
      response->set_max_queued_requests(options.limits.max_queued_requests);
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest*,
                                    v1::GetLoadResponse* response) override {
    return Answer(f_, context, Role::kAdmin, [&](const Caller&) {
      const EngineStats stats = f_.engine.Stats();
      response->set_running_requests(stats.running);
      response->set_queued_requests(stats.queued);
      response->set_used_kv_blocks(stats.cache.paged_pages_used);
      response->set_total_kv_blocks(stats.cache.paged_pages_total);
      response->set_state(stats.draining ? v1::SERVING_STATE_DRAINING : v1::SERVING_STATE_SERVING);
      response->set_used_cache_bytes(stats.cache.used_bytes);
      response->set_total_cache_bytes(stats.cache.total_bytes);
      return absl::OkStatus();
    });
  }

  grpc::ServerWriteReactor<v1::DrainResponse>* Drain(grpc::CallbackServerContext* context,
                                                     const v1::DrainRequest* request) override {
    return new DrainCall(f_, context, *request);
  }

  grpc::ServerUnaryReactor* Resume(grpc::CallbackServerContext* context, const v1::ResumeRequest*,
                                   v1::ResumeResponse*) override {
    return Answer(f_, context, Role::kAdmin, [&](const Caller&) { return f_.resume(); });
  }

 private:
  const Frontend& f_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeModelService(const Frontend& frontend) {
  return std::make_unique<ModelServiceImpl>(frontend);
}
std::unique_ptr<grpc::Service> MakeAdminService(const Frontend& frontend) {
  return std::make_unique<AdminServiceImpl>(frontend);
}

}  // namespace longspan
