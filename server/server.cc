#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <climits>
#include <filesystem>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "server/admin_service.h"
#include "server/attention_service.h"
#include "server/device.h"
#include "server/frontend.h"
#include "server/http_door.h"
#include "server/inference_service.h"
#include "server/log.h"
#include "server/needle_service.h"
#include "server/rpc_interceptor.h"
#include "server/version.h"

namespace longspan {
namespace {

constexpr char kReadyService[] = "longspan.v1.InferenceService";

// As a channel argument; gRPC reads INT_MAX as "for ever".
int Milliseconds(absl::Duration duration) {
  return static_cast<int>(std::min<int64_t>(absl::ToInt64Milliseconds(duration), INT_MAX));
}

}  // namespace

struct Server::Impl {
  ServerConfig config;
  std::unique_ptr<Backend> backend;
  LoadedModel model;
  std::unique_ptr<Access> access;
  std::unique_ptr<Metrics> metrics;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<StallWatchdog> watchdog;
  std::unique_ptr<PromptWorker> prompt_worker;
  std::unique_ptr<Frontend> frontend;
  std::vector<std::unique_ptr<grpc::Service>> services;
  std::unique_ptr<grpc::Server> grpc;
  std::unique_ptr<HttpDoor> http;
  int grpc_port = 0;
  std::atomic<bool> ready{false};
  absl::Mutex drain_mu;  // a Resume comes before the end of the process begins, or is refused
  bool stopping ABSL_GUARDED_BY(drain_mu) = false;

  absl::Status Load(const std::function<void()>& request_shutdown);
  absl::Status Listen(std::function<void()> request_shutdown);
  std::vector<HttpDoor::Route> Routes();
  void SetReady(bool value) {
    ready = value;
    if (auto* health = grpc->GetHealthCheckService())
      health->SetServingStatus(kReadyService, value);
  }
  void Drain() {
    absl::MutexLock lock(&drain_mu);
    SetReady(false);
    engine->Drain();
  }
  absl::Status Resume() {
    absl::MutexLock lock(&drain_mu);
    if (stopping) return absl::FailedPreconditionError("the server is shutting down");
    engine->Resume();
    SetReady(true);
    return absl::OkStatus();
  }
};

absl::Status Server::Impl::Load(const std::function<void()>& request_shutdown) {
  auto keys = Access::Open(config.api_key_file);
  if (!keys.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("--api-key-file: ", keys.status().message()));
  }
  access = *std::move(keys);
  if (config.model.empty()) {
    auto path = DefaultModelPath();
    if (!path.ok()) return path.status();
    config.model = *path;
  }
  const auto cache_dtype = KvDtypeOf(config.kv_dtype, config.device);
  if (!cache_dtype.ok()) return cache_dtype.status();
  auto opened = OpenDevice({.device = config.device,
                            .threads = config.threads,
                            .simd = config.simd,
                            .deterministic = config.deterministic});
  if (!opened.ok()) return opened.status();
  backend = *std::move(opened);

  ModelOptions options;
  options.max_rows = config.max_batched_tokens;
  options.max_logit_rows = std::max(options.max_logit_rows, config.max_running);
  options.cache_dtype = *cache_dtype;
  auto loaded = LoadModel(config.model, *backend, options);
  // Not InvalidArgument: the command was used rightly, the file is not good.
  if (!loaded.ok()) return absl::FailedPreconditionError(loaded.status().message());
  model = *std::move(loaded);
  if (config.names.empty()) config.names = {model.model->spec().name};

  EngineOptions engine_options;
  engine_options.limits.max_batched_tokens = config.max_batched_tokens;
  engine_options.limits.max_running = config.max_running;
  engine_options.limits.max_queued_requests = config.max_queued_requests;
  engine_options.limits.max_queued_tokens = config.max_queued_tokens;
  engine_options.cache_bytes = config.cache_bytes;
  engine_options.memory_fraction = config.memory_fraction;
  engine_options.on_failure = request_shutdown;
  engine_options.page_tokens = config.page_tokens;
  engine_options.max_context = config.max_context;
  engine_options.spans = LevelOf(config.attention_metrics);
  engine_options.span_every = config.attention_sample_every;
  const int context = config.max_context > 0 ? config.max_context : model.model->spec().max_context;
  metrics =
      std::make_unique<Metrics>(config.names.front(), context, config.metrics_compat == "vllm");
  auto made = Engine::Create(&model, *backend, engine_options,
                             [m = metrics.get()](const StepReport& report) { m->OnStep(report); });
  if (!made.ok()) return made.status();
  engine = *std::move(made);
  metrics->Attach(engine.get(), backend.get(), engine_options.spans);
  return absl::OkStatus();
}

absl::Status Server::Impl::Listen(std::function<void()> request_shutdown) {
  watchdog = std::make_unique<StallWatchdog>(config.stall_timeout);
  prompt_worker = std::make_unique<PromptWorker>();
  ConversionContext conversion;
  conversion.tokenizer = model.tokenizer.get();
  conversion.chat_template = model.chat_template.get();
  conversion.spec = &model.model->spec();
  conversion.max_context = engine->options().max_context;
  conversion.model_names = config.names;
  conversion.max_prompt_bytes = config.max_prompt_bytes;
  frontend.reset(new Frontend{
      *engine, *metrics, *watchdog, *access, *prompt_worker, std::move(conversion),
      config.max_header_bytes, static_cast<size_t>(config.log_prompt_bytes), backend->name(),
      config.model, [this] { Drain(); }, [this] { return Resume(); }, std::move(request_shutdown)});

  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  auto credentials = CredentialsOf(config.tls);
  if (!credentials.ok()) return credentials.status();
  builder.AddListeningPort(config.grpc, *credentials, &grpc_port);
  builder.SetMaxReceiveMessageSize(static_cast<int>(config.max_message_bytes));
  builder.SetMaxSendMessageSize(-1);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, config.max_concurrent_streams);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Without these a client that pings every 30 s is sent away (ENHANCE_YOUR_CALM).
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, Milliseconds(config.keepalive_time));
  // Frontend::Authenticate tells the numbers; what gRPC refuses before has none.
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE,
                             2 * static_cast<int>(config.max_header_bytes));
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                             Milliseconds(config.max_connection_age));
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                             Milliseconds(config.max_connection_age_grace));
  services.push_back(MakeInferenceService(*frontend));
  services.push_back(MakeAttentionService(*frontend));
  services.push_back(MakeNeedleService(*frontend));
  services.push_back(MakeModelService(*frontend));
  services.push_back(MakeAdminService(*frontend));
  for (const auto& service : services) builder.RegisterService(service.get());
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(MakeRpcInterceptor(*metrics, *access));
  builder.experimental().SetInterceptorCreators(std::move(interceptors));
  grpc = builder.BuildAndStart();
  if (grpc == nullptr || grpc_port == 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen for gRPC on ", config.grpc));
  }
  if (!config.http.empty()) {
    auto opened = HttpDoor::Open(config.http, Routes(), [this](absl::string_view key) {
      return access->Authenticate(key, Role::kUser).status();
    });
    if (!opened.ok()) return opened.status();
    http = *std::move(opened);
  }
  SetReady(true);
  return absl::OkStatus();
}

std::vector<HttpDoor::Route> Server::Impl::Routes() {
  static constexpr char kExposition[] = "text/plain; version=0.0.4; charset=utf-8";
  return {
      {"/metrics", /*open=*/false,
       [this] {
         return HttpDoor::Page{200, kExposition, metrics->Page()};
       }},
      {"/metrics/attention", /*open=*/false,
       [this] {
         return HttpDoor::Page{200, kExposition, metrics->AttentionPage()};
       }},
      {"/metrics/attention/heads", /*open=*/false,
       [this] {
         return HttpDoor::Page{200, kExposition, metrics->HeadsPage()};
       }},
      {"/health", /*open=*/true,
       [this] {
         const bool up = ready && !engine->Stats().draining;
         return HttpDoor::Page{up ? 200 : 503, "text/plain; charset=utf-8",
                               up ? "ready\n" : "draining\n"};
       }},
      {"/version", /*open=*/false,
       [] {
         return HttpDoor::Page{
             200, "application/json",
             absl::StrCat("{\"version\":\"", kVersion, "\",\"commit\":\"", kGitCommit, "\"}\n")};
       }},
  };
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerConfig& config,
                                                      std::function<void()> request_shutdown) {
  if (absl::Status valid = Validate(config); !valid.ok()) return valid;
  auto impl = std::make_unique<Impl>();
  impl->config = config;
  if (absl::Status loaded = impl->Load(request_shutdown); !loaded.ok()) return loaded;
  std::unique_ptr<Server> server(new Server(std::move(impl)));
  if (absl::Status up = server->impl_->Listen(std::move(request_shutdown)); !up.ok()) return up;
  return server;
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() {
  impl_->http.reset();
  if (impl_->grpc != nullptr) {
    if (impl_->engine != nullptr) {
      impl_->engine->CancelAll(absl::UnavailableError("the server is shutting down"));
    }
    impl_->grpc->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(2));
    impl_->grpc->Wait();
  }
  impl_->services.clear();
  impl_->prompt_worker.reset();  // its last job may still be on its way out of a call that ended
  impl_->engine.reset();         // before the metrics and the model that its thread uses
}

int Server::grpc_port() const { return impl_->grpc_port; }
int Server::http_port() const { return impl_->http != nullptr ? impl_->http->port() : 0; }
Engine& Server::engine() { return *impl_->engine; }

void Server::LogReady(absl::Duration after) const {
  const ModelSpec& spec = impl_->model.model->spec();
  const auto Address = [](absl::string_view asked, int port) {
    return absl::StrCat(asked.substr(0, asked.rfind(':')), ":", port);
  };
  const bool http = impl_->http != nullptr;
  Log(LogLevel::kInfo, "ready",
      {{"grpc", Address(impl_->config.grpc, grpc_port())},
       {"http", http ? Address(impl_->config.http, http_port()) : "off"},
       {"model", impl_->config.names.front()},
       {"family", spec.family},
       {"context", impl_->engine->options().max_context},
       {"device", impl_->backend->name()},
       {"cache_bytes", impl_->engine->options().cache_bytes},
       {"seconds", LogValue::Seconds(absl::ToDoubleSeconds(after))}});
}

int Server::DrainAndStop() {
  {
    absl::MutexLock lock(&impl_->drain_mu);
    impl_->stopping = true;
    impl_->SetReady(false);
  }
  absl::SleepFor(impl_->config.withdrawal_grace);
  impl_->engine->Drain();
  int aborted = 0;
  if (!impl_->engine->WaitIdle(impl_->config.shutdown_timeout)) {
    const EngineStats stats = impl_->engine->Stats();
    aborted = stats.running + stats.queued;
    impl_->engine->CancelAll(absl::UnavailableError("the server is shutting down"));
    impl_->engine->WaitIdle(absl::Seconds(5));
  }
  return aborted;
}

}  // namespace longspan
