#pragma once
// What every service shares: the engine, the metrics, how requests are converted, whether the
// server is ready. Lives as long as the server; thread-safe.
#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "engine/engine.h"
#include "server/access.h"
#include "server/metrics.h"
#include "server/prompt_worker.h"
#include "server/request_conversion.h"
#include "server/stall_watchdog.h"

namespace longspan {

struct Frontend {
  Engine& engine;
  Metrics& metrics;
  StallWatchdog& watchdog;
  Access& access;
  PromptWorker& prompt_worker;
  ConversionContext conversion;
  int64_t max_header_bytes;
  size_t log_prompt_bytes;  // 0: none of a prompt's text is logged
  std::string device;
  std::string model_path;
  // Takes no new requests, and tells health checks so, until Resume.
  std::function<void()> drain;
  // FailedPrecondition once the process is about to end.
  std::function<absl::Status()> resume;
  // Starts an orderly end of the process, as SIGTERM does (AdminService.Drain with shutdown).
  std::function<void()> request_shutdown;
  std::string instance_id = NewId("ls-");
  absl::Time started = absl::Now();

  // Who calls; the first thing that every method asks. ResourceExhausted for headers beyond the
  // limit.
  absl::StatusOr<Caller> Authenticate(const grpc::CallbackServerContext& context, Role role) const;

  absl::Status Submit(Request request, EventSink sink) const {
    return engine.Submit(std::move(request), metrics.Observe(std::move(sink)));
  }
};

}  // namespace longspan
