#pragma once
// Builds metric families from plain numbers, for snapshots that are read at scrape time.
#include <prometheus/metric_family.h>

#include <string>
#include <utility>
#include <vector>

namespace longspan {

class MetricPage {
 public:
  using Labels = std::vector<std::pair<std::string, std::string>>;

  void Counter(const std::string& name, const std::string& help, double value, const Labels& = {});
  void Gauge(const std::string& name, const std::string& help, double value, const Labels& = {});
  // A classic histogram: upper bounds (the last is +Inf) and the count in each bucket.
  void Histogram(const std::string& name, const std::string& help,
                 const std::vector<double>& bounds, const std::vector<double>& counts, double sum,
                 const Labels& = {});

  std::vector<prometheus::MetricFamily> Take() { return std::move(families_); }

 private:
  prometheus::ClientMetric& Add(const std::string& name, const std::string& help,
                                prometheus::MetricType type, const Labels& labels);
  std::vector<prometheus::MetricFamily> families_;
};

// Series of one engine for /metrics, and the attention series for both pages.
class Engine;
class Backend;
void AddEngineSeries(const Engine& engine, const Backend& backend, const std::string& model_name,
                     bool vllm_aliases, MetricPage& page);
// Per layer, summed over heads: small enough for /metrics.
void AddAttentionLayers(const Engine& engine, MetricPage& page);
// For /metrics/attention: where each layer's mass lies and, if per_head, the layer × head matrices.
// needle_mass: [layers, heads] of the last needle run, or empty.
void AddAttentionDetail(const Engine& engine, bool per_head, const std::vector<double>& needle_mass,
                        MetricPage& page);

}  // namespace longspan
