// A model's speed without a server: prefill, decode, and each op's time, bytes and operations.
#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "engine/engine.h"
#include "models/family.h"
#include "server/bench.h"
#include "server/config.h"
#include "server/device.h"

namespace longspan {
namespace {

using nlohmann::ordered_json;

OpCounts ReadProfile(const Backend& backend) {
  OpCounts counts;
  for (int i = 0; i < kOpCount; ++i) {
    const auto op = static_cast<OpId>(i);
    const OpTotals& totals = backend.Profile(op);
    counts[{op, ""}] = {totals.calls, totals.nanoseconds, totals.bytes, totals.flops};
  }
  return counts;
}

// What was counted between two looks.
OpCounts Between(const OpCounts& before, OpCounts after) {
  for (const auto& [key, count] : before) after[key] -= count;
  return after;
}

// A kind of work. `readers` prompts of `context` tokens are read together, while `decoders`
// sequences that have read `context` tokens of their own generate; without decoders or without
// readers it is prefill or decode alone.
struct Workload {
  std::string name;
  int readers = 0, decoders = 0, context = 0;
};

// One measured kind of work: medians over its repeats, and the ops of all of them; then the ops of
// one more repetition, in which each op was timed on the device.
struct Phase {
  Workload work;
  double tokens_per_second = 0;  // of the readers if there are any, else of the decoders
  std::vector<double> runs;      // the same of each repeat
  double longest_gap = 0;        // seconds between two tokens of a decoder
  int64_t bytes_per_step = 0;    // that decoding alone must read
  int64_t cache_bytes = 0;       // that the decoders held at the end of a repeat
  uint64_t preemptions = 0;      // in all repeats
  OpCounts ops, timed_ops;
  double timed_seconds = 0;  // of the repetition of timed_ops
};

class OfflineBench {
 public:
  static absl::StatusOr<std::unique_ptr<OfflineBench>> Open(const BenchOptions& options,
                                                            const std::vector<Workload>& works);

  // InvalidArgument with both numbers where the context or the cache is too small.
  absl::Status Check(const Workload& work) const;
  absl::StatusOr<Phase> Measure(const Workload& work);
  std::string Title() const {
    return absl::StrCat(
        loaded_.model->spec().name,
        options_.shape.empty() ? "" : absl::StrCat(" (random ", options_.weights, " weights)"),
        " on ", backend_->name());
  }
  Roofline MeasureRoofline() { return backend_->MeasureRoofline(); }

 private:
  explicit OfflineBench(const BenchOptions& options) : options_(options) {}
  class Sequence;
  struct Run {
    int64_t tokens = 0;
    double seconds = 0, longest_gap = 0;
    EngineStats stats;  // at the end, while the decoders decode
    OpCounts ops, timed_ops;
  };
  absl::StatusOr<LoadedModel> Load(DType cache_dtype) const;
  int max_context() const { return engine_->options().max_context; }
  int64_t BytesPerStep(const Workload& work) const;
  absl::StatusOr<Run> Once(const Workload& work);

  const BenchOptions options_;
  std::unique_ptr<Backend> backend_;
  LoadedModel loaded_;
  std::unique_ptr<Engine> engine_;
  int runs_ = 0;
};

absl::StatusOr<LoadedModel> OfflineBench::Load(DType cache_dtype) const {
  ModelOptions model_options;
  model_options.max_rows = options_.max_batched_tokens;
  model_options.cache_dtype = cache_dtype;
  if (!options_.shape.empty()) {
    const auto config = ShapePath(options_.shape);
    if (!config.ok()) return config.status();
    const DType weights = options_.weights == "q8_0"   ? DType::kQ8_0
                          : options_.weights == "q4_k" ? DType::kQ4_K
                                                       : DType::kBF16;
    return LoadRandomModel(*config, weights, *backend_, model_options);
  }
  const auto path =
      options_.model.empty() ? DefaultModelPath() : absl::StatusOr<std::string>(options_.model);
  if (!path.ok()) return path.status();
  return LoadModel(*path, *backend_, model_options);
}

absl::StatusOr<std::unique_ptr<OfflineBench>> OfflineBench::Open(
    const BenchOptions& options, const std::vector<Workload>& works) {
  std::unique_ptr<OfflineBench> bench(new OfflineBench(options));
  const auto cache_dtype = KvDtypeOf(options.kv_dtype, options.device);
  if (!cache_dtype.ok()) return cache_dtype.status();
  auto device = OpenDevice({.device = options.device,
                            .threads = options.threads,
                            .simd = options.simd,
                            .deterministic = options.deterministic});
  if (!device.ok()) return device.status();
  bench->backend_ = *std::move(device);
  auto loaded = bench->Load(*cache_dtype);
  if (!loaded.ok()) return loaded.status();
  bench->loaded_ = *std::move(loaded);
  EngineOptions engine_options;
  engine_options.cache_bytes = options.cache_bytes;
  engine_options.max_context = options.max_context;
  engine_options.page_tokens = options.page_tokens;
  engine_options.limits.max_batched_tokens = options.max_batched_tokens;
  engine_options.spans = LevelOf(options.attention_metrics);
  engine_options.span_every = options.attention_sample_every;
  for (const Workload& work : works) {
    int& most = engine_options.limits.max_running;
    most = std::max(most, work.readers + work.decoders);
  }
  auto engine = Engine::Create(&bench->loaded_, *bench->backend_, engine_options);
  if (!engine.ok()) return engine.status();
  bench->engine_ = *std::move(engine);
  return bench;
}

absl::Status OfflineBench::Check(const Workload& work) const {
  const int tokens = work.context + (work.decoders > 0 ? options_.tokens : 0) + 1;
  if (tokens > max_context()) {
    return absl::InvalidArgumentError(absl::StrCat("'", work.name, "' needs ", tokens,
                                                   " tokens, the context is ", max_context()));
  }
  const int64_t needed =
      DemandOf(engine_->cache_shape(), tokens).bytes * (work.readers + work.decoders);
  const int64_t held = engine_->Stats().cache.total_bytes;
  if (needed <= held) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "'", work.name, "' needs ", needed, " bytes of cache, it has ", held, "; see --cache-bytes"));
}

// Every weight once, but of an embedding table that is not the output's too only a few rows; and of
// the caches what each layer sees.
int64_t OfflineBench::BytesPerStep(const Workload& work) const {
  const Model& model = *loaded_.model;
  const ModelSpec& spec = model.spec();
  int64_t bytes = model.weight_bytes();
  for (const Slot& slot : SlotsOf(spec, loaded_.checkpoint->format())) {
    if (slot.id != Slot::Id::kEmbedding || spec.tied_embeddings) continue;
    bytes -= static_cast<int64_t>(loaded_.checkpoint->Find(slot.tensor)->data.size());
  }
  for (const LayerSpec& layer : spec.layers) {
    const CacheNeed need = NeedOf(layer.mixer, model.cache_dtype());
    const int seen = need.window > 0 ? std::min(need.window, work.context) : work.context;
    bytes += work.decoders * need.bytes_per_token * seen;
  }
  return bytes;
}

// One request of a bench, watched from any thread.
class OfflineBench::Sequence {
 public:
  // Random-looking tokens, greedy, to the last of `output` tokens.
  static absl::StatusOr<std::unique_ptr<Sequence>> Start(OfflineBench& bench, int prompt,
                                                         int output) {
    auto sequence = std::make_unique<Sequence>();
    const int run = ++bench.runs_;
    Request request;
    request.id = sequence->id_ = absl::StrCat("bench-", run);
    const int vocab = bench.loaded_.model->spec().vocab;
    for (int64_t i = 0; i < prompt; ++i) {
      request.prompt.push_back(static_cast<int32_t>((i * 7919 + run * int64_t{104729}) % vocab));
    }
    request.sampling.temperature = 0;
    request.stopping.max_tokens = output;
    request.stopping.ignore_eos = true;
    const absl::Status status = bench.engine_->Submit(
        std::move(request), [s = sequence.get()](Event event) { s->On(std::move(event)); });
    if (!status.ok()) return status;
    return sequence;
  }

  // Waits for `tokens` more tokens than it has made since StartCounting(), or for its end.
  void AwaitTokens(int tokens) {
    absl::MutexLock lock(&mu_);
    awaited_ = tokens;
    mu_.Await(absl::Condition(this, &Sequence::HasTokens));
  }
  absl::Status AwaitEnd() {
    absl::MutexLock lock(&mu_);
    mu_.Await(absl::Condition(this, &Sequence::Ended));
    return *status_;
  }
  void StartCounting() {
    absl::MutexLock lock(&mu_);
    tokens_ = 0;
    longest_gap_ = absl::ZeroDuration();
  }
  const std::string& id() const { return id_; }
  int tokens() const {
    absl::MutexLock lock(&mu_);
    return tokens_;
  }
  absl::Duration longest_gap() const {
    absl::MutexLock lock(&mu_);
    return longest_gap_;
  }

 private:
  void On(Event event) {
    const absl::Time now = absl::Now();
    absl::MutexLock lock(&mu_);
    if (event.kind == Event::Kind::kFinished) {
      status_ = std::move(event.status);
    } else if (event.kind == Event::Kind::kDelta && event.token.has_value()) {
      if (tokens_ > 0) longest_gap_ = std::max(longest_gap_, now - last_);
      last_ = now;
      ++tokens_;
    }
  }
  bool HasTokens() const { return tokens_ >= awaited_ || Ended(); }
  bool Ended() const { return status_.has_value(); }

  std::string id_;
  mutable absl::Mutex mu_;
  std::optional<absl::Status> status_;
  absl::Time last_;
  absl::Duration longest_gap_;
  int tokens_ = 0, awaited_ = 0;
};

absl::StatusOr<OfflineBench::Run> OfflineBench::Once(const Workload& work) {
  // Decoders go on until they are told to stop, so that all decode all the while.
  std::vector<std::unique_ptr<Sequence>> decoders;
  for (int i = 0; i < work.decoders; ++i) {
    auto started = Sequence::Start(*this, work.context, max_context() - work.context);
    if (!started.ok()) return started.status();
    decoders.push_back(*std::move(started));
  }
  for (const auto& decoder : decoders) decoder->AwaitTokens(1);
  for (const auto& decoder : decoders) decoder->StartCounting();
  Run run;
  const OpCounts ops = ReadProfile(*backend_), timed_ops = backend_->TimedOps();
  const absl::Time begin = absl::Now();
  std::vector<std::unique_ptr<Sequence>> readers;
  for (int i = 0; i < work.readers; ++i) {
    auto started = Sequence::Start(*this, work.context, 1);
    if (!started.ok()) return started.status();
    readers.push_back(*std::move(started));
  }
  for (const auto& reader : readers) {
    if (absl::Status ended = reader->AwaitEnd(); !ended.ok()) return ended;
    run.tokens += work.context;
  }
  if (work.readers == 0) {
    for (const auto& decoder : decoders) decoder->AwaitTokens(options_.tokens);
    for (const auto& decoder : decoders) run.tokens += decoder->tokens();
  }
  run.seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  run.ops = Between(ops, ReadProfile(*backend_));
  run.timed_ops = Between(timed_ops, backend_->TimedOps());
  run.stats = engine_->Stats();
  for (const auto& decoder : decoders) {
    run.longest_gap = std::max(run.longest_gap, absl::ToDoubleSeconds(decoder->longest_gap()));
    engine_->Cancel(decoder->id());
    if (absl::Status ended = decoder->AwaitEnd(); !absl::IsCancelled(ended)) {
      return absl::InternalError(absl::StrCat("a decoder ended early: ", ended.ToString()));
    }
  }
  engine_->WaitIdle(absl::Seconds(5));
  return run;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

absl::StatusOr<Phase> OfflineBench::Measure(const Workload& work) {
  Phase phase;
  phase.work = work;
  if (auto warm = Once(work); !warm.ok()) return warm.status();
  const uint64_t preemptions = engine_->Stats().preemptions;
  std::vector<double> gaps;
  for (int i = 0; i < options_.repeats; ++i) {
    auto run = Once(work);
    if (!run.ok()) return run.status();
    phase.runs.push_back(static_cast<double>(run->tokens) / run->seconds);
    gaps.push_back(run->longest_gap);
    for (const auto& [key, count] : run->ops) phase.ops[key] += count;
    if (work.decoders > 0) phase.cache_bytes = run->stats.cache.used_bytes;
    phase.preemptions = run->stats.preemptions - preemptions;
  }
  phase.tokens_per_second = Median(phase.runs);
  phase.longest_gap = Median(gaps);
  if (work.readers == 0) phase.bytes_per_step = BytesPerStep(work);
  if (options_.ops) {
    backend_->TimeOps(true);
    auto run = Once(work);
    backend_->TimeOps(false);
    if (!run.ok()) return run.status();
    phase.timed_ops = std::move(run->timed_ops);
    phase.timed_seconds = run->seconds;
  }
  return phase;
}

std::string NameOf(const OpCounts::key_type& key) {
  const auto& [op, kind] = key;
  return absl::StrCat(OpName(op), kind.empty() ? "" : " ", kind);
}

void PrintPhase(const Phase& phase, const Roofline& roofline) {
  std::cout << absl::StreamFormat("%-40s %10.1f tokens/s", phase.work.name,
                                  phase.tokens_per_second);
  if (phase.work.decoders > 0) {
    std::cout << absl::StreamFormat("  longest gap %.1f ms", phase.longest_gap * 1e3);
  }
  if (phase.bytes_per_step > 0) {
    const double step = phase.work.decoders / phase.tokens_per_second;
    const double bytes = static_cast<double>(phase.bytes_per_step);
    std::cout << absl::StreamFormat("  a step %.2f ms, %.0f%% of reading its %.2f GB", step * 1e3,
                                    100 * bytes / roofline.bytes_per_second / step, bytes / 1e9);
  }
  std::cout << "\n";
  int64_t total = 0;
  for (const auto& [key, op] : phase.timed_ops) total += op.nanoseconds;
  for (const auto& [key, op] : phase.timed_ops) {
    if (op.calls == 0) continue;
    const double ns = static_cast<double>(std::max<int64_t>(op.nanoseconds, 1));
    const double gb = static_cast<double>(op.bytes) / ns, gop = static_cast<double>(op.flops) / ns;
    const double most = roofline.OperationsPerSecond(key.first, key.second);
    std::cout << absl::StreamFormat(
        "    %-30s %8d calls %10.1f us each %5.1f%% of time %8.2f GB/s %4.0f%% %9.2f GOP/s "
        "%4.0f%% of %.0f\n",
        NameOf(key), op.calls, ns / 1e3 / static_cast<double>(op.calls),
        100 * ns / static_cast<double>(std::max<int64_t>(total, 1)), gb,
        1e11 * gb / roofline.bytes_per_second, gop, 1e11 * gop / most, most / 1e9);
  }
}

ordered_json OpsJson(const OpCounts& counts) {
  ordered_json ops = ordered_json::object();
  for (const auto& [key, op] : counts) {
    if (op.calls == 0) continue;
    ops[NameOf(key)] = {{"calls", op.calls},
                        {"nanoseconds", op.nanoseconds},
                        {"bytes", op.bytes},
                        {"flops", op.flops}};
  }
  return ops;
}

ordered_json PhaseJson(const Phase& phase) {
  return {{"name", phase.work.name},
          {"readers", phase.work.readers},
          {"decoders", phase.work.decoders},
          {"context", phase.work.context},
          {"tokens_per_second", phase.tokens_per_second},
          {"runs", phase.runs},
          {"longest_gap_seconds", phase.longest_gap},
          {"bytes_per_step", phase.bytes_per_step},
          {"cache_bytes", phase.cache_bytes},
          {"preemptions", phase.preemptions},
          {"ops", OpsJson(phase.ops)},
          {"timed_seconds", phase.timed_seconds},
          {"timed_ops", OpsJson(phase.timed_ops)}};
}

Workload Prefill(const BenchItem& prompt) {
  const int count = std::max(prompt.count, 1);
  return {absl::StrCat("prefill ", count > 1 ? absl::StrCat(count, " x ") : "", prompt.tokens),
          count, 0, prompt.tokens};
}

Workload Decode(int batch, int context) {
  return {absl::StrCat("decode, ", batch, batch == 1 ? " sequence" : " sequences", " at ", context),
          0, batch, context};
}

std::vector<Workload> WorksOf(const BenchOptions& options) {
  std::vector<Workload> works;
  for (const BenchItem& prompt : options.prompts) works.push_back(Prefill(prompt));
  for (const BenchItem& context : options.contexts) {
    if (context.count > 0) {
      works.push_back(Decode(context.count, context.tokens));
      continue;
    }
    for (const int64_t batch : options.batches) {
      works.push_back(Decode(static_cast<int>(batch), context.tokens));
    }
  }
  const int prompt = options.prompts.back().tokens;
  const int batch = static_cast<int>(options.batches.back());
  works.push_back(
      {absl::StrCat("prefill ", prompt, " beside ", batch, " decoding"), 1, batch, prompt});
  return works;
}

}  // namespace

int BenchModel(const BenchOptions& options) {
  const std::vector<Workload> works = WorksOf(options);
  auto bench = OfflineBench::Open(options, works);
  if (!bench.ok()) {
    std::cerr << "longspan bench: " << bench.status().message() << "\n";
    return 1;
  }
  for (const Workload& work : works) {
    if (absl::Status possible = (*bench)->Check(work); !possible.ok()) {
      std::cerr << "longspan bench: " << possible.message() << "\n";
      return 2;
    }
  }
  const Roofline roofline = (*bench)->MeasureRoofline();
  ordered_json phases = ordered_json::array();
  if (!options.json) {
    std::cout << (*bench)->Title()
              << absl::StreamFormat(
                     "; it reads %.1f GB/s, which is 100%%, and does as many GOP/s as "
                     "stand beside each op\n",
                     roofline.bytes_per_second / 1e9);
  }
  for (const Workload& work : works) {
    auto phase = (*bench)->Measure(work);
    if (!phase.ok()) {
      std::cerr << "longspan bench: " << work.name << ": " << phase.status().message() << "\n";
      return 1;
    }
    if (options.json) {
      phases.push_back(PhaseJson(*phase));
    } else {
      PrintPhase(*phase, roofline);
    }
  }
  if (options.json) {
    const ordered_json result = {
        {"machine", (*bench)->Title()},
        {"read_bytes_per_second", roofline.bytes_per_second},
        {"operations_per_second", roofline.operations_per_second},
        {"product_operations_per_second", roofline.product_operations_per_second},
        {"phases", phases}};
    std::cout << result.dump(2) << "\n";
  }
  return 0;
}

}  // namespace longspan
