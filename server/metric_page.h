#pragma once
// Writes plain numbers as Prometheus text, for snapshots that are read at scrape time: a page of
// 64 x 64 heads is some tens of thousands of series.
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

  // Exposition format 0.0.4. Series of one name stand together, in the order of first mention.
  std::string Text() const;

 private:
  // The family's text so far, begun with its help and type.
  std::string& Family(const std::string& name, const std::string& help, const char* type);
  std::vector<std::pair<std::string, std::string>> families_;  // name, text
};

// Series of one engine for /metrics, and the attention series for both pages.
class Engine;
class Backend;
void AddEngineSeries(const Engine& engine, const Backend& backend, const std::string& model_name,
                     bool vllm_aliases, MetricPage& page);
// Per layer, summed over heads: small enough for /metrics.
void AddAttentionLayers(const Engine& engine, MetricPage& page);
// For /metrics/attention: where each layer's mass lies and, if per_head, the layer x head matrices
// of spans, copies and needles. needle_mass: [layers, heads] of the last needle run, or empty.
void AddAttentionDetail(const Engine& engine, bool per_head, const std::vector<double>& needle_mass,
                        MetricPage& page);
// For /metrics/attention/heads: what else is known of each head.
void AddAttentionHeads(const Engine& engine, MetricPage& page);

}  // namespace longspan
