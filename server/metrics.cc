#include "server/metrics.h"

#include <prometheus/gauge.h>
#include <prometheus/text_serializer.h>

#include <sstream>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/metric_page.h"
#include "server/version.h"

namespace longspan {
namespace {

using prometheus::Histogram;

// vLLM's buckets, so that its dashboards and alerts read the same.
const Histogram::BucketBoundaries kFirstToken = {.001, .005, .01, .02, .04, .06, .08, .1,
                                                 .25,  .5,   .75, 1,   2.5, 5,   7.5, 10,
                                                 20,   40,   80,  160, 640, 2560};
// vLLM's, and three below for models that decode in under a hundredth of a second.
const Histogram::BucketBoundaries kInterToken = {.001, .0025, .005, .01, .025, .05, .075, .1,
                                                 .15,  .2,    .3,   .4,  .5,   .75, 1,    2.5,
                                                 5,    7.5,   10,   20,  40,   80};
const Histogram::BucketBoundaries kLatency = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                              30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Histogram::BucketBoundaries kStep = {.0005, .001, .0025, .005, .01, .025,
                                           .05,   .1,   .25,   .5,   1,   2.5};

// 1, 2, 5, 10, … as vLLM has them, up to the first that holds `most`.
Histogram::BucketBoundaries TokenBuckets(int most) {
  Histogram::BucketBoundaries buckets;
  for (double decade = 1;; decade *= 10) {
    for (const double step : {1, 2, 5}) {
      buckets.push_back(decade * step);
      if (buckets.back() >= most) return buckets;
    }
  }
}

Histogram& Make(prometheus::Registry& registry, const char* name, const char* help,
                const Histogram::BucketBoundaries& buckets,
                const std::map<std::string, std::string>& labels = {}) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(labels, buckets);
}

// Histograms that vLLM's dashboards and autoscalers read under its own names.
void AddAliases(const std::string& model_name, std::vector<prometheus::MetricFamily>& families) {
  static constexpr std::pair<const char*, const char*> kAliases[] = {
      {"longspan_time_to_first_token_seconds", "vllm:time_to_first_token_seconds"},
      {"longspan_inter_token_latency_seconds", "vllm:inter_token_latency_seconds"},
      {"longspan_request_duration_seconds", "vllm:e2e_request_latency_seconds"}};
  const size_t count = families.size();
  for (const auto& [ours, theirs] : kAliases) {
    for (size_t i = 0; i < count; ++i) {
      if (families[i].name != ours) continue;
      prometheus::MetricFamily alias = families[i];
      alias.name = theirs;
      alias.help = absl::StrCat("As ", ours, ".");
      for (auto& metric : alias.metric) {
        metric.label.push_back({"model_name", model_name});
        metric.label.push_back({"engine", "0"});
      }
      families.push_back(std::move(alias));
    }
  }
}

std::string Serialize(const std::vector<prometheus::MetricFamily>& families) {
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, families);
  return out.str();
}

}  // namespace

struct Metrics::Latencies {
  Latencies(prometheus::Registry& r, const Histogram::BucketBoundaries& tokens)
      : first_token(Make(r, "longspan_time_to_first_token_seconds", "Submission to first token.",
                         kFirstToken)),
        inter_token(Make(r, "longspan_inter_token_latency_seconds",
                         "Between two tokens of one choice.", kInterToken)),
        duration(Make(r, "longspan_request_duration_seconds", "Submission to end.", kLatency)),
        queue(Make(r, "longspan_request_queue_seconds", "Submission to first step.", kLatency)),
        prefill(
            Make(r, "longspan_request_prefill_seconds", "First step to first token.", kLatency)),
        decode(Make(r, "longspan_request_decode_seconds", "First token to last.", kLatency)),
        prompt_tokens(
            Make(r, "longspan_request_prompt_tokens", "Prompt tokens of a request.", tokens)),
        generation_tokens(Make(r, "longspan_request_generation_tokens",
                               "Tokens generated for a request, all choices.", tokens)),
        batch_tokens(Make(r, "longspan_batch_tokens", "Token rows of a step.", tokens)),
        step_prefill(Make(r, "longspan_step_seconds",
                          "Time of a step; prefill: it reads some prompt.", kStep,
                          {{"phase", "prefill"}})),
        step_decode(prometheus::BuildHistogram()
                        .Name("longspan_step_seconds")
                        .Help("Time of a step; prefill: it reads some prompt.")
                        .Register(r)
                        .Add({{"phase", "decode"}}, kStep)) {}

  Histogram &first_token, &inter_token, &duration, &queue, &prefill, &decode, &prompt_tokens,
      &generation_tokens, &batch_tokens, &step_prefill, &step_decode;
};

Metrics::Metrics(std::string model_name, int max_model_len, bool vllm_aliases)
    : rpcs_(prometheus::BuildCounter()
                .Name("longspan_rpc_handled_total")
                .Help("Calls answered, by method and status code.")
                .Register(registry_)),
      needle_(prometheus::BuildGauge()
                  .Name("longspan_needle_score")
                  .Help("Score, from 0 to 1, of the last needle run's cells.")
                  .Register(registry_)),
      latencies_(std::make_shared<Latencies>(registry_, TokenBuckets(max_model_len))),
      model_name_(std::move(model_name)),
      vllm_aliases_(vllm_aliases) {
  prometheus::BuildGauge()
      .Name("longspan_build_info")
      .Help("1; version and commit are in the labels.")
      .Register(registry_)
      .Add({{"version", kVersion}, {"commit", kGitCommit}})
      .Set(1);
  auto& refusals = prometheus::BuildCounter()
                       .Name("longspan_refusals_total")
                       .Help("Requests refused at submission, by reason.")
                       .Register(registry_);
  for (const char* reason : {"NEVER_FITS", "QUEUE_FULL", "KEY_LIMIT"}) {
    refusals_[reason] = &refusals.Add({{"reason", absl::AsciiStrToLower(reason)}});
  }
}

EventSink Metrics::Observe(EventSink sink) {
  struct State {
    absl::flat_hash_map<int, absl::Time> last;
    absl::Time begin = absl::Now();
  };
  return [latencies = latencies_, state = State(), sink = std::move(sink)](Event event) mutable {
    const absl::Time now = absl::Now();
    if (event.kind == Event::Kind::kDelta && event.token.has_value()) {
      if (state.last.empty()) {
        latencies->first_token.Observe(absl::ToDoubleSeconds(now - state.begin));
      }
      const auto [it, first] = state.last.try_emplace(event.index, now);
      if (!first) latencies->inter_token.Observe(absl::ToDoubleSeconds(now - it->second));
      it->second = now;
    } else if (event.kind == Event::Kind::kFinished && event.status.ok()) {
      latencies->queue.Observe(absl::ToDoubleSeconds(event.timings.queued));
      latencies->prefill.Observe(absl::ToDoubleSeconds(event.timings.prefill));
      latencies->decode.Observe(absl::ToDoubleSeconds(event.timings.decode));
      latencies->duration.Observe(absl::ToDoubleSeconds(now - state.begin));
      latencies->prompt_tokens.Observe(event.prompt_tokens);
      latencies->generation_tokens.Observe(event.completion_tokens);
    }
    sink(std::move(event));
  };
}

void Metrics::OnStep(const StepReport& report) {
  latencies_->batch_tokens.Observe(report.prefill_tokens + report.decode_tokens);
  (report.prefill_tokens > 0 ? latencies_->step_prefill : latencies_->step_decode)
      .Observe(absl::ToDoubleSeconds(report.duration));
}

void Metrics::CountRpc(absl::string_view method, absl::string_view code) {
  rpcs_.Add({{"method", std::string(method)}, {"code", std::string(code)}}).Increment();
}

void Metrics::CountRefusal(const absl::Status& status) {
  const auto reason = status.GetPayload(kErrorReason);
  if (!reason.has_value()) return;
  const auto known = refusals_.find(std::string(*reason));
  if (known != refusals_.end()) known->second->Increment();
}

void Metrics::SetNeedleScore(int context_length, double depth_percent, double score) {
  needle_
      .Add({{"context_length", std::to_string(context_length)},
            {"depth", absl::StrFormat("%g", depth_percent)}})
      .Set(score);
}

void Metrics::SetNeedleMass(std::vector<double> mean) {
  absl::MutexLock lock(&mu_);
  needle_mass_ = std::move(mean);
}

void Metrics::Attach(const Engine* engine, const Backend* backend, SpanLevel level) {
  backend_ = backend;
  level_ = level;
  engine_.store(engine, std::memory_order_release);
}

std::string Metrics::Page() const {
  MetricPage page;
  if (const Engine* engine = engine_.load(std::memory_order_acquire); engine != nullptr) {
    AddEngineSeries(*engine, *backend_, model_name_, vllm_aliases_, page);
    if (level_ != SpanLevel::kOff) AddAttentionLayers(*engine, page);
  }
  std::vector<prometheus::MetricFamily> families = registry_.Collect();
  if (vllm_aliases_) AddAliases(model_name_, families);
  return Serialize(families) + page.Text();
}

std::string Metrics::AttentionPage() const {
  MetricPage page;
  if (const Engine* engine = engine_.load(std::memory_order_acquire);
      engine != nullptr && level_ != SpanLevel::kOff) {
    std::vector<double> needle_mass;
    {
      absl::MutexLock lock(&mu_);
      needle_mass = needle_mass_;
    }
    AddAttentionDetail(*engine, /*per_head=*/level_ == SpanLevel::kHead, needle_mass, page);
  }
  return page.Text();
}

std::string Metrics::HeadsPage() const {
  MetricPage page;
  if (const Engine* engine = engine_.load(std::memory_order_acquire);
      engine != nullptr && level_ == SpanLevel::kHead) {
    AddAttentionHeads(*engine, page);
  }
  return page.Text();
}

}  // namespace longspan
