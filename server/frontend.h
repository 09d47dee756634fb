#pragma once
// What every service shares: the engine, the metrics, how requests are converted, whether the
// server is ready. Lives as long as the server; thread-safe.
#include <functional>
#include <memory>
#include <string>

#include "absl/time/clock.h"
#include "engine/engine.h"
#include "server/metrics.h"
#include "server/request_conversion.h"
#include "server/stall_watchdog.h"

namespace longspan {

struct Frontend {
  Engine& engine;
  Metrics& metrics;
  StallWatchdog& watchdog;
  ConversionContext conversion;
  std::string device;
  std::string model_path;
  // Tells health checks whether new requests are welcome; nothing is refused by it.
  std::function<void(bool)> set_ready;
  // Starts an orderly end of the process, as SIGTERM does (AdminService.Drain with shutdown).
  std::function<void()> request_shutdown;
  std::string instance_id = NewId("ls-");
  absl::Time started = absl::Now();

  absl::Status Submit(Request request, EventSink sink) const {
    return engine.Submit(std::move(request), metrics.Observe(std::move(sink)));
  }
};

}  // namespace longspan
