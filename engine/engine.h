#pragma once
// The engine: one thread that turns requests into events. Submit and Cancel are the only ways in, a
// request's sink is the only way out. All public methods are safe from any thread.
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/attention_spans.h"
#include "engine/kv_cache.h"
#include "engine/request.h"
#include "engine/scheduler.h"
#include "models/model.h"

namespace longspan {

struct EngineOptions {
  SchedulerLimits limits;
  // 0: on a device with memory of its own memory_fraction of what is free, else 512 MiB or what one
  // context of the model needs if more.
  int64_t cache_bytes = 0;
  double memory_fraction = 0.9;
  // Called once on the engine thread when Health() has turned bad; must not block.
  std::function<void()> on_failure;
  int page_tokens = 16;  // tail waste against table size; GPUs like 16 to 64
  int max_context = 0;   // 0: the model's
  SpanLevel spans = SpanLevel::kHead;
  int span_every = 16;  // observe one decode step in N
};

// Monotone counters and gauges for metrics; a consistent copy.
struct EngineStats {
  int running = 0, queued = 0;  // choices with and without cache
  int64_t queued_tokens = 0;    // prompts of requests that have not begun
  CacheUsage cache;
  uint64_t prompt_tokens = 0, cached_prompt_tokens = 0;  // cached: read with another choice's
  uint64_t generation_tokens = 0, preemptions = 0, steps = 0;
  uint64_t step_rows = 0;
  uint64_t finished_stop = 0, finished_length = 0, cancelled = 0, deadline_exceeded = 0, failed = 0;
  double step_seconds = 0;  // spent in steps, all together
  bool draining = false;
};

// Told of each finished step, on the engine thread; must not block. For histograms.
struct StepReport {
  int prefill_tokens = 0, decode_tokens = 0;
  absl::Duration duration;
};

class Engine {
 public:
  static absl::StatusOr<std::unique_ptr<Engine>> Create(
      LoadedModel* model, Backend& backend, const EngineOptions& options,
      absl::AnyInvocable<void(const StepReport&)> on_step = nullptr);
  ~Engine();  // cancels all, joins

  // Checks the request against the model and limits (InvalidArgument with field, value, limit;
  // ResourceExhausted "can never fit" or "queue is full" with the numbers; AlreadyExists;
  // Unavailable while draining) and queues it. If OK, `sink` gets events until kFinished; else it
  // is never called.
  absl::Status Submit(Request request, EventSink sink);
  // Ends the request with CANCELLED within one step and frees what it holds. False: no such id in
  // flight.
  bool Cancel(const std::string& id);
  void CancelAll(absl::Status why);

  void Drain();  // refuse new requests, finish the accepted ones
  void Resume();
  bool Idle() const;
  bool WaitIdle(absl::Duration timeout) const;

  // UNAVAILABLE with the device's words once it has failed: every request in flight has ended with
  // that, Submit() refuses, and only a new process can do better.
  absl::Status Health() const;

  EngineStats Stats() const;
  AttentionSpans& spans() const;
  const LoadedModel& model() const;
  const EngineOptions& options() const;  // with defaults filled in
  CacheShape cache_shape() const;
  // Runs KvCache::CheckIntegrity on the engine thread between steps.
  absl::Status CheckIntegrity();

 private:
  struct Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longspan
