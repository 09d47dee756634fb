#include "server/metric_page.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/engine.h"
#include "server/span_proto.h"

namespace longspan {

namespace {

// The shortest text that reads back as the same number.
void AppendNumber(double value, std::string& text) {
  if (!std::isfinite(value)) {
    text += std::isnan(value) ? "NaN" : value > 0 ? "+Inf" : "-Inf";
    return;
  }
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value).ptr;
  text.append(buffer, end);
}

void AppendLabel(absl::string_view key, absl::string_view value, std::string& text) {
  absl::StrAppend(&text, text.back() == '{' ? "" : ",", key, "=\"");
  for (const char c : value) {
    if (c == '\\' || c == '"') text += '\\';
    if (c == '\n') {
      text += "\\n";
    } else {
      text += c;
    }
  }
  text += '"';
}

void AppendSeries(absl::string_view name, const MetricPage::Labels& labels, absl::string_view extra,
                  double extra_value, double value, std::string& text) {
  absl::StrAppend(&text, name);
  if (!labels.empty() || !extra.empty()) {
    text += '{';
    for (const auto& [key, label] : labels) AppendLabel(key, label, text);
    if (!extra.empty()) {
      std::string bound;
      AppendNumber(extra_value, bound);
      AppendLabel(extra, bound, text);
    }
    text += '}';
  }
  text += ' ';
  AppendNumber(value, text);
  text += '\n';
}

}  // namespace

std::string& MetricPage::Family(const std::string& name, const std::string& help,
                                const char* type) {
  const auto known = std::find_if(families_.rbegin(), families_.rend(),
                                  [&](const auto& family) { return family.first == name; });
  if (known != families_.rend()) return known->second;
  families_.emplace_back(
      name, absl::StrCat("# HELP ", name, " ", help, "\n# TYPE ", name, " ", type, "\n"));
  return families_.back().second;
}

void MetricPage::Counter(const std::string& name, const std::string& help, double value,
                         const Labels& labels) {
  AppendSeries(name, labels, "", 0, value, Family(name, help, "counter"));
}

void MetricPage::Gauge(const std::string& name, const std::string& help, double value,
                       const Labels& labels) {
  AppendSeries(name, labels, "", 0, value, Family(name, help, "gauge"));
}

void MetricPage::Histogram(const std::string& name, const std::string& help,
                           const std::vector<double>& bounds, const std::vector<double>& counts,
                           double sum, const Labels& labels) {
  std::string& text = Family(name, help, "histogram");
  double cumulative = 0;
  for (size_t i = 0; i < bounds.size(); ++i) {
    cumulative += counts[i];
    AppendSeries(absl::StrCat(name, "_bucket"), labels, "le", bounds[i], std::round(cumulative),
                 text);
  }
  AppendSeries(absl::StrCat(name, "_count"), labels, "", 0, std::round(cumulative), text);
  AppendSeries(absl::StrCat(name, "_sum"), labels, "", 0, sum, text);
}

std::string MetricPage::Text() const {
  std::string text;
  for (const auto& [name, series] : families_) text += series;
  return text;
}

void AddEngineSeries(const Engine& engine, const Backend& backend, const std::string& model_name,
                     bool vllm_aliases, MetricPage& page) {
  const EngineStats s = engine.Stats();
  const CacheShape shape = engine.cache_shape();
  const ModelSpec& spec = engine.model().model->spec();
  const double usage =
      s.cache.total_bytes > 0 ? static_cast<double>(s.cache.used_bytes) / s.cache.total_bytes : 0;

  page.Gauge("longspan_requests_running", "Sequences that hold cache.", s.running);
  page.Gauge("longspan_requests_waiting", "Sequences that wait for cache.", s.queued);
  page.Gauge("longspan_tokens_waiting", "Prompt tokens of the sequences that wait.",
             s.queued_tokens);
  page.Gauge("longspan_draining", "1 while new requests are refused.", s.draining ? 1 : 0);
  page.Gauge("longspan_kv_cache_usage_ratio",
             "Share of the cache arena that holds referenced pages.", usage);
  page.Gauge("longspan_kv_cache_bytes", "Bytes of the cache arena by state.", s.cache.used_bytes,
             {{"state", "used"}});
  page.Gauge("longspan_kv_cache_bytes", "", s.cache.total_bytes - s.cache.used_bytes,
             {{"state", "free"}});
  const struct {
    const char* kind;
    int64_t used, free, page_bytes;
  } kinds[] = {
      {"paged", s.cache.paged_pages_used, s.cache.paged_pages_free, shape.paged_page_bytes},
      {"ring", s.cache.ring_pages_used, s.cache.ring_pages_free, shape.ring_page_bytes}};
  for (const auto& k : kinds) {
    page.Gauge("longspan_kv_blocks", "Cache pages by kind and state; free counts free superblocks.",
               k.used, {{"kind", k.kind}, {"state", "used"}});
    page.Gauge("longspan_kv_blocks", "", k.free, {{"kind", k.kind}, {"state", "free"}});
  }
  for (const auto& k : kinds) {
    page.Gauge("longspan_kv_used_bytes", "Bytes of referenced pages by cache kind.",
               static_cast<double>(k.used * k.page_bytes), {{"kind", k.kind}});
  }
  page.Counter("longspan_prompt_tokens_total", "Prompt tokens by where their keys came from.",
               s.prompt_tokens, {{"source", "computed"}});
  page.Counter("longspan_prompt_tokens_total", "", s.cached_prompt_tokens, {{"source", "cached"}});
  page.Counter("longspan_generation_tokens_total", "Tokens generated.", s.generation_tokens);
  const struct {
    const char* outcome;
    uint64_t count;
  } outcomes[] = {{"stop", s.finished_stop},
                  {"length", s.finished_length},
                  {"cancelled", s.cancelled},
                  {"deadline_exceeded", s.deadline_exceeded},
                  {"failed", s.failed}};
  for (const auto& o : outcomes) {
    page.Counter("longspan_requests_total", "Requests and choices that ended, by outcome.", o.count,
                 {{"outcome", o.outcome}});
  }
  page.Counter("longspan_preemptions_total", "Sequences whose cache was taken back.",
               s.preemptions);
  page.Counter("longspan_steps_total", "Forward passes.", s.steps);
  page.Counter("longspan_step_rows_total", "Token rows of all forward passes.", s.step_rows);
  for (int op = 0; op < kOpCount; ++op) {
    const OpTotals& t = backend.Profile(static_cast<OpId>(op));
    page.Counter("longspan_op_calls_total", "Calls of an op.", t.calls,
                 {{"op", OpName(static_cast<OpId>(op))}});
  }
  for (int op = 0; op < kOpCount; ++op) {
    const OpTotals& t = backend.Profile(static_cast<OpId>(op));
    page.Counter("longspan_op_seconds_total", "Time in an op.", t.nanoseconds * 1e-9,
                 {{"op", OpName(static_cast<OpId>(op))}});
  }
  for (int op = 0; op < kOpCount; ++op) {
    const OpTotals& t = backend.Profile(static_cast<OpId>(op));
    page.Counter("longspan_op_bytes_total", "Bytes that an op had to move.", t.bytes,
                 {{"op", OpName(static_cast<OpId>(op))}});
  }
  for (int op = 0; op < kOpCount; ++op) {
    const OpTotals& t = backend.Profile(static_cast<OpId>(op));
    page.Counter("longspan_op_flops_total", "Floating-point operations of an op.", t.flops,
                 {{"op", OpName(static_cast<OpId>(op))}});
  }
  page.Gauge("longspan_model_info", "1; the model's name and shape are in the labels.", 1,
             {{"model", model_name},
              {"family", spec.family},
              {"layers", std::to_string(spec.layers.size())},
              {"window", std::to_string(spec.window())},
              {"max_context", std::to_string(engine.options().max_context)}});
  if (!vllm_aliases) return;
  const MetricPage::Labels model = {{"model_name", model_name}, {"engine", "0"}};
  page.Gauge("vllm:num_requests_running", "As longspan_requests_running.", s.running, model);
  page.Gauge("vllm:num_requests_waiting", "As longspan_requests_waiting.", s.queued, model);
  page.Gauge("vllm:kv_cache_usage_perc", "As longspan_kv_cache_usage_ratio.", usage, model);
  page.Gauge("vllm:cache_config_info", "1; block size and count are in the labels.", 1,
             {{"block_size", std::to_string(shape.page_tokens)},
              {"num_gpu_blocks", std::to_string(s.cache.paged_pages_total)},
              {"model_name", model_name},
              {"engine", "0"}});
}

namespace {

// One family: a sum over observed queries. Divide by span_observations_total (sink_mass by
// sink_observations_total), as rates, for a mean over any time and any number of servers.
struct AttentionSeries {
  const char* name;
  const char* help;
  double HeadSums::*field;
  bool on_first_page;  // of heads: /metrics/attention, else /metrics/attention/heads
};
constexpr AttentionSeries kAttentionSeries[] = {
    {"span_observations_total", "Decode queries observed; the denominator of the sums.",
     &HeadSums::queries, true},
    {"span_tokens_sum_total", "Mean attention distance in tokens, sinks excluded.",
     &HeadSums::distance, true},
    {"far_mass_total", "Attention mass beyond the model's window, sinks excluded.",
     &HeadSums::far_mass, false},
    {"sink_mass_total", "Attention mass on the first 4 tokens, where the window is past them.",
     &HeadSums::sink_mass, false},
    {"sink_observations_total", "Queries that sink mass was summed over.", &HeadSums::sink_queries,
     false},
    {"entropy_normalized_total", "Attention entropy over ln of the context.", &HeadSums::entropy,
     false},
    {"top1_probability_total", "Largest attention probability.", &HeadSums::top_probability, false},
    {"copy_hits_total", "Generated tokens that equal the far token attended to most.",
     &HeadSums::copy_hits, true},
};

// A head whose copy rate is above this is counted as a retrieval head (Wu et al., arXiv
// 2404.15574).
constexpr double kRetrievalRate = 0.1;

std::string Padded(int value, int count) {
  return absl::StrFormat("%0*d", count > 100 ? 3 : 2, value);
}

// A layer that has attention, with its labels.
struct AttentionLayer {
  int index, heads;
  MetricPage::Labels labels;
  MetricPage::Labels With(const char* name, std::string value) const {
    MetricPage::Labels all = labels;
    all.emplace_back(name, std::move(value));
    return all;
  }
};

std::vector<AttentionLayer> AttentionLayers(const ModelSpec& spec, const SpanSums& sums) {
  std::vector<AttentionLayer> layers;
  for (int l = 0; l < sums.layers; ++l) {
    const auto* attention = std::get_if<AttentionSpec>(&spec.layers[l].mixer);
    if (attention == nullptr) continue;
    layers.push_back({l,
                      attention->heads,
                      {{"layer", Padded(l, sums.layers)}, {"kind", KindName(spec.layers[l])}}});
  }
  return layers;
}

// Sums to a ten-thousandth: no query is told apart by less, and a page is half as long.
double Rounded(double value) { return std::round(value * 1e4) / 1e4; }

void AddMatrix(const AttentionSeries& series, const SpanSums& sums,
               const std::vector<AttentionLayer>& layers, MetricPage& page) {
  for (const AttentionLayer& layer : layers) {
    for (int h = 0; h < layer.heads; ++h) {
      page.Counter(absl::StrCat("longspan_attention_", series.name), series.help,
                   Rounded(sums.at(layer.index, h).*series.field),
                   layer.With("head", Padded(h, sums.heads)));
    }
  }
}

// Each layer's mass by distance, twice: as counters by bucket, and as a classic histogram, whose
// counts are whole numbers and therefore in thousandths of a query's mass.
void AddDistances(const SpanSums& sums, const std::vector<AttentionLayer>& layers, int max_context,
                  MetricPage& page) {
  constexpr double kUnits = 1000;
  int buckets = 1;  // those that a context can reach
  while (buckets < kDistanceBuckets && std::ldexp(1.0, buckets - 1) < max_context) ++buckets;
  std::vector<double> bounds;
  for (int b = 0; b + 1 < buckets; ++b) bounds.push_back(std::ldexp(1.0, b) - 1);
  bounds.push_back(std::numeric_limits<double>::infinity());
  for (const AttentionLayer& layer : layers) {
    std::vector<double> mass(buckets);
    double distance = 0;
    for (int h = 0; h < layer.heads; ++h) {
      const HeadSums& s = sums.at(layer.index, h);
      for (int b = 0; b < kDistanceBuckets; ++b) {
        mass[std::min(b, buckets - 1)] += s.mass_by_distance[b];
      }
      distance += kUnits * s.distance;
    }
    for (int b = 0; b < buckets; ++b) {
      page.Counter(
          "longspan_attention_mass_by_distance_total",
          "Attention mass over all heads; bucket 0: distance 0, k: from 2^(k-1) below 2^k.",
          mass[b], layer.With("bucket", Padded(b, buckets)));
    }
    for (double& m : mass) m *= kUnits;
    page.Histogram("longspan_attention_layer_span_tokens",
                   "Attention mass by distance, in thousandths of a query's mass over all heads.",
                   bounds, mass, distance, layer.labels);
  }
}

}  // namespace

void AddAttentionLayers(const Engine& engine, MetricPage& page) {
  const SpanSnapshot snapshot = engine.spans().Snapshot();
  const std::vector<AttentionLayer> layers =
      AttentionLayers(engine.model().model->spec(), snapshot.sums);
  for (const AttentionSeries& series : kAttentionSeries) {
    for (const AttentionLayer& layer : layers) {
      double sum = 0;
      for (int h = 0; h < layer.heads; ++h) sum += snapshot.sums.at(layer.index, h).*series.field;
      page.Counter(absl::StrCat("longspan_attention_layer_", series.name),
                   absl::StrCat(series.help, " Summed over heads."), sum, layer.labels);
    }
  }
  page.Gauge("longspan_attention_window_tokens", "Window of the sliding layers; 0: there are none.",
             engine.model().model->spec().window());
  page.Counter("longspan_attention_sampled_steps_total", "Decode steps that were observed.",
               static_cast<double>(snapshot.sampled_steps));
  page.Counter("longspan_attention_dropped_steps_total",
               "Decode steps that were due to be observed and were not.",
               static_cast<double>(snapshot.dropped_steps));
}

void AddAttentionDetail(const Engine& engine, bool per_head, const std::vector<double>& needle_mass,
                        MetricPage& page) {
  const ModelSpec& spec = engine.model().model->spec();
  const SpanSnapshot snapshot = engine.spans().Snapshot();
  const std::vector<AttentionLayer> layers = AttentionLayers(spec, snapshot.sums);
  AddDistances(snapshot.sums, layers, engine.options().max_context, page);
  std::map<std::string, int> retrieval;
  for (const AttentionLayer& layer : layers) {
    int& count = retrieval[KindName(spec.layers[layer.index])];
    for (int h = 0; h < layer.heads; ++h) {
      const HeadSums& s = snapshot.sums.at(layer.index, h);
      count += s.queries > 0 && s.copy_hits > kRetrievalRate * s.queries;
    }
  }
  for (const auto& [kind, count] : retrieval) {
    page.Gauge(
        "longspan_attention_retrieval_heads",
        "Heads that copy from beyond the window in more than a tenth of the observed queries.",
        count, {{"kind", kind}});
  }
  if (!per_head) return;
  for (const AttentionSeries& series : kAttentionSeries) {
    if (series.on_first_page) AddMatrix(series, snapshot.sums, layers, page);
  }
  for (const AttentionLayer& layer : layers) {
    for (int h = 0; h < layer.heads; ++h) {
      const size_t at = layer.index * snapshot.sums.heads + h;
      const MetricPage::Labels labels = layer.With("head", Padded(h, snapshot.sums.heads));
      page.Gauge("longspan_attention_head_span_tokens",
                 "Mean attention distance of about the last 64 observed queries, sinks excluded.",
                 Rounded(snapshot.recent_distance[at]), labels);
      if (needle_mass.empty()) continue;
      page.Gauge("longspan_attention_needle_mass",
                 "Mean attention on the needle while the last needle run's answers began.",
                 Rounded(needle_mass[at]), labels);
    }
  }
}

void AddAttentionHeads(const Engine& engine, MetricPage& page) {
  const SpanSnapshot snapshot = engine.spans().Snapshot();
  const std::vector<AttentionLayer> layers =
      AttentionLayers(engine.model().model->spec(), snapshot.sums);
  for (const AttentionSeries& series : kAttentionSeries) {
    if (!series.on_first_page) AddMatrix(series, snapshot.sums, layers, page);
  }
}

}  // namespace longspan
