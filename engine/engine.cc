// The engine's public face: checks, the inbox, and answers that need no step.
#include "engine/engine.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/engine_impl.h"

namespace longspan {
namespace {

constexpr int64_t kDefaultCacheBytes = int64_t{512} << 20;

// Fills in defaults; InvalidArgument names the flag, its value and its limits.
absl::StatusOr<EngineOptions> Complete(EngineOptions options, const Model& model,
                                       int64_t free_bytes) {
  if (options.max_context <= 0) options.max_context = model.spec().max_context;
  options.max_context = std::min(options.max_context, model.spec().max_context);
  if (options.span_every < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention-sample-every is ", options.span_every, ", must be at least 1"));
  }
  const SchedulerLimits& limits = options.limits;
  if (limits.max_batched_tokens < 1 || limits.max_batched_tokens > model.max_rows()) {
    return absl::InvalidArgumentError(absl::StrCat("max-batched-tokens is ",
                                                   limits.max_batched_tokens,
                                                   ", must be from 1 to ", model.max_rows()));
  }
  if (limits.max_running < 1 || limits.max_running > model.max_logit_rows()) {
    return absl::InvalidArgumentError(absl::StrCat("max-running is ", limits.max_running,
                                                   ", must be from 1 to ", model.max_logit_rows()));
  }
  if (options.cache_bytes <= 0 && free_bytes >= 0) {
    if (!(options.memory_fraction > 0 && options.memory_fraction <= 1)) {
      return absl::InvalidArgumentError(absl::StrCat("memory-fraction is ", options.memory_fraction,
                                                     ", must be above 0 and at most 1"));
    }
    options.cache_bytes =
        static_cast<int64_t>(options.memory_fraction * static_cast<double>(free_bytes));
  }
  if (options.cache_bytes <= 0) {
    const CacheShape shape = ShapeOf(model.spec(), model.cache_dtype(), options.page_tokens);
    options.cache_bytes = std::max(kDefaultCacheBytes, BytesToHold(shape, options.max_context));
  }
  return options;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(
    LoadedModel* model, Backend& backend, const EngineOptions& given,
    absl::AnyInvocable<void(const StepReport&)> on_step) {
  absl::StatusOr<EngineOptions> options = Complete(given, *model->model, backend.FreeBytes());
  if (!options.ok()) return options.status();
  const Model& m = *model->model;
  auto cache =
      KvCache::Create(backend, m.spec(), m.cache_dtype(), options->page_tokens,
                      options->cache_bytes, options->limits.max_running, options->max_context);
  if (!cache.ok()) return cache.status();
  auto impl =
      std::make_unique<Impl>(model, backend, *options, std::move(on_step), *std::move(cache));
  impl->Rehearse();
  impl->Publish();
  Impl* running = impl.get();
  std::unique_ptr<Engine> engine(new Engine(std::move(impl)));
  running->thread = std::thread([running] { running->Loop(); });
  return engine;
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::~Engine() {
  {
    absl::MutexLock lock(&impl_->mu);
    impl_->draining = true;
    impl_->cancel_all = absl::UnavailableError("the server is shutting down");
    impl_->stop = true;
  }
  impl_->thread.join();
}

absl::Status Engine::Submit(Request request, EventSink sink) {
  Impl& impl = *impl_;
  if (absl::Status valid = Validate(request, impl.limits); !valid.ok()) return valid;
  if (request.output.attention_spans && impl.options.spans == SpanLevel::kOff) {
    return absl::FailedPreconditionError(
        "output.return_attention_spans: attention spans are off on this server");
  }
  const absl::Time now = absl::Now();
  if (request.deadline <= now) {
    return absl::DeadlineExceededError(absl::StrCat("the deadline passed ",
                                                    absl::FormatDuration(now - request.deadline),
                                                    " before submission"));
  }
  const int64_t tokens = static_cast<int64_t>(request.prompt.size());
  const int64_t most = tokens + request.stopping.max_tokens;
  const SchedulerLimits& limits = impl.options.limits;

  absl::MutexLock lock(&impl.mu);
  if (!impl.failure.ok()) return impl.failure;
  if (impl.stop || impl.draining) return absl::UnavailableError("the server is draining");
  if (!impl.cache->CouldEverFit(most)) {
    const CacheDemand demand = DemandOf(impl.cache->shape(), most);
    return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                          "can never fit: ", most, " tokens need ", demand.paged_pages, " paged + ",
                          demand.ring_pages, " ring pages = ", demand.bytes,
                          " bytes, the cache holds ", impl.stats.cache.total_bytes)),
                      "NEVER_FITS");
  }
  if (tokens > limits.max_queued_tokens) {
    return WithReason(absl::ResourceExhaustedError(absl::StrCat("can never fit: the prompt has ",
                                                                tokens, " tokens, the queue holds ",
                                                                limits.max_queued_tokens)),
                      "NEVER_FITS");
  }
  if (impl.in_flight.contains(request.id)) {
    return absl::AlreadyExistsError(absl::StrCat("request_id: ", request.id, " is in flight"));
  }
  if (impl.waiting_requests >= limits.max_queued_requests) {
    return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                          "queue is full: ", impl.waiting_requests, " requests wait, the limit is ",
                          limits.max_queued_requests)),
                      "QUEUE_FULL");
  }
  if (impl.waiting_tokens + tokens > limits.max_queued_tokens) {
    return WithReason(
        absl::ResourceExhaustedError(absl::StrCat(
            "queue is full: ", impl.waiting_tokens, " prompt tokens wait and this request has ",
            tokens, ", the limit is ", limits.max_queued_tokens)),
        "QUEUE_FULL");
  }
  impl.in_flight.insert(request.id);
  ++impl.unfinished;
  ++impl.waiting_requests;
  impl.waiting_tokens += tokens;
  Incoming incoming;
  incoming.seed = request.sampling.seed.has_value() ? *request.sampling.seed
                                                    : absl::Uniform<uint64_t>(impl.random);
  incoming.request = std::move(request);
  incoming.sink = std::move(sink);
  incoming.submitted = now;
  impl.inbox.push_back(std::move(incoming));
  return absl::OkStatus();
}

bool Engine::Cancel(const std::string& id) {
  absl::MutexLock lock(&impl_->mu);
  if (!impl_->in_flight.contains(id)) return false;
  impl_->cancels.push_back(id);
  return true;
}

void Engine::CancelAll(absl::Status why) {
  CHECK(!why.ok());
  absl::MutexLock lock(&impl_->mu);
  impl_->cancel_all = std::move(why);
}

void Engine::Drain() {
  absl::MutexLock lock(&impl_->mu);
  impl_->draining = true;
}

void Engine::Resume() {
  absl::MutexLock lock(&impl_->mu);
  impl_->draining = false;
}

bool Engine::Idle() const {
  absl::MutexLock lock(&impl_->mu);
  return impl_->unfinished == 0;
}

bool Engine::WaitIdle(absl::Duration timeout) const {
  absl::MutexLock lock(&impl_->mu);
  return impl_->mu.AwaitWithTimeout(
      absl::Condition(
          +[](int* unfinished) { return *unfinished == 0; }, &impl_->unfinished),
      timeout);
}

absl::Status Engine::Health() const {
  absl::MutexLock lock(&impl_->mu);
  return impl_->failure;
}

EngineStats Engine::Stats() const {
  absl::MutexLock lock(&impl_->mu);
  EngineStats stats = impl_->stats;
  stats.queued += static_cast<int>(impl_->inbox.size());
  stats.queued_tokens = impl_->waiting_tokens;
  stats.draining = impl_->draining;
  return stats;
}

AttentionSpans& Engine::spans() const { return impl_->spans; }
const LoadedModel& Engine::model() const { return *impl_->loaded; }
const EngineOptions& Engine::options() const { return impl_->options; }
CacheShape Engine::cache_shape() const { return impl_->cache->shape(); }

absl::Status Engine::CheckIntegrity() {
  // A sink may ask too: it already is on the engine thread.
  if (std::this_thread::get_id() == impl_->thread.get_id()) return impl_->cache->CheckIntegrity();
  absl::Status status;
  absl::Notification done;
  {
    absl::MutexLock lock(&impl_->mu);
    if (impl_->stop) return absl::UnavailableError("the engine has stopped");
    impl_->integrity.emplace_back(&status, &done);
  }
  done.WaitForNotification();
  return status;
}

}  // namespace longspan
