#pragma once
// What the server counts, as Prometheus metrics. References are resolved once at start; events cost
// a few histogram observations on the engine thread. A scrape reads published snapshots and never
// waits for a step. Thread-safe.
#include <prometheus/collectable.h>
#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "engine/engine.h"

namespace longspan {

class Metrics {
 public:
  // vllm_aliases: also export the vllm: series that endpoint pickers and autoscalers read.
  Metrics(std::string model_name, bool vllm_aliases);

  // Wraps a request's sink so that its latencies and counts are recorded.
  EventSink Observe(EventSink sink);
  void OnStep(const StepReport& report);
  void CountRpc(absl::string_view method, absl::string_view code);
  void SetNeedleScore(int context_length, double depth_percent, double score);
  void SetNeedleMass(std::vector<double> mean);  // [layers, heads]

  // The engine is known only after it was created with OnStep; until then pages lack its series.
  void Attach(const Engine* engine, const Backend* backend, SpanLevel level);

  std::string Page() const;           // /metrics
  std::string AttentionPage() const;  // /metrics/attention
  std::string HeadsPage() const;      // /metrics/attention/heads

 private:
  struct Latencies;
  prometheus::Registry registry_;
  prometheus::Family<prometheus::Counter>& rpcs_;
  prometheus::Family<prometheus::Gauge>& needle_;
  std::shared_ptr<const Latencies> latencies_;
  const std::string model_name_;
  const bool vllm_aliases_;
  std::atomic<const Engine*> engine_{nullptr};
  const Backend* backend_ = nullptr;
  SpanLevel level_ = SpanLevel::kOff;
  mutable absl::Mutex mu_;
  std::vector<double> needle_mass_ ABSL_GUARDED_BY(mu_);
};

}  // namespace longspan
