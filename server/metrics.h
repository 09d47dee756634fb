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
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "engine/engine.h"

namespace longspan {

class Metrics {
 public:
  // max_model_len: in tokens; how far token histograms reach. vllm_aliases: also export the vllm:
  // series that endpoint pickers and autoscalers read.
  Metrics(std::string model_name, int max_model_len, bool vllm_aliases);

  // Wraps a request's sink so that its latencies and counts are recorded.
  EventSink Observe(EventSink sink);
  void OnStep(const StepReport& report);
  void CountRpc(absl::string_view method, absl::string_view code);
  // How a request ended before it began; counts those with a reason to come again or go elsewhere:
  // QUEUE_FULL, KEY_LIMIT, NEVER_FITS.
  void CountRefusal(const absl::Status& status);
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
  std::map<std::string, prometheus::Counter*> refusals_;  // by reason; fixed at start
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
