// longspan bench: how fast a model is, op by op, without a server; or how fast a server answers.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "engine/engine.h"
#include "longspan/v1/admin.grpc.pb.h"
#include "longspan/v1/inference.grpc.pb.h"
#include "server/cli.h"
#include "server/cli_client.h"
#include "server/config.h"

namespace longspan {
namespace {

using nlohmann::ordered_json;

struct BenchOptions {
  std::string model, server, kv_dtype = "bf16";
  std::vector<int64_t> prompts = {128, 512, 2048};
  int tokens = 64, batch = 8, repeats = 3, threads = 0, max_batched_tokens = 512;
  int requests = 64, concurrency = 8;
  bool json = false, ops = true;
};

// --- Offline
// ---------------------------------------------------------------------------------------

struct OpCount {
  int64_t calls = 0, nanoseconds = 0, bytes = 0, flops = 0;
};
using OpCounts = std::vector<OpCount>;

OpCounts ReadProfile(const Backend& backend) {
  OpCounts counts(kOpCount);
  for (int i = 0; i < kOpCount; ++i) {
    const OpTotals& totals = backend.Profile(static_cast<OpId>(i));
    counts[i] = {totals.calls, totals.nanoseconds, totals.bytes, totals.flops};
  }
  return counts;
}

// One measured kind of work: the median of its repeats, and the ops of all of them.
struct Phase {
  std::string name;
  double tokens_per_second = 0;
  OpCounts ops;
};

class OfflineBench {
 public:
  static absl::StatusOr<std::unique_ptr<OfflineBench>> Open(const BenchOptions& options);

  // `sequences` prompts of `prompt` tokens at once, `output` tokens each; counts prompt tokens if
  // output is 1, else generated ones.
  absl::StatusOr<Phase> Measure(std::string name, int sequences, int prompt, int output);
  int max_context() const { return engine_->options().max_context; }
  std::string Title() const {
    return absl::StrCat(loaded_.model->spec().name, " on ", backend_->name());
  }

 private:
  explicit OfflineBench(const BenchOptions& options) : options_(options) {}
  absl::StatusOr<double> Once(int sequences, int prompt, int output);

  const BenchOptions options_;
  std::unique_ptr<Backend> backend_;
  LoadedModel loaded_;
  std::unique_ptr<Engine> engine_;
  int runs_ = 0;
};

absl::StatusOr<std::unique_ptr<OfflineBench>> OfflineBench::Open(const BenchOptions& options) {
  std::unique_ptr<OfflineBench> bench(new OfflineBench(options));
  std::string path = options.model;
  if (path.empty()) {
    auto found = DefaultModelPath();
    if (!found.ok()) return found.status();
    path = *found;
  }
  bench->backend_ = Backend::Cpu({.threads = options.threads});
  ModelOptions model_options;
  model_options.max_rows = options.max_batched_tokens;
  model_options.cache_dtype = options.kv_dtype == "f32" ? DType::kF32 : DType::kBF16;
  auto loaded = LoadModel(path, *bench->backend_, model_options);
  if (!loaded.ok()) return loaded.status();
  bench->loaded_ = *std::move(loaded);
  EngineOptions engine_options;
  engine_options.limits.max_batched_tokens = options.max_batched_tokens;
  auto engine = Engine::Create(&bench->loaded_, *bench->backend_, engine_options);
  if (!engine.ok()) return engine.status();
  bench->engine_ = *std::move(engine);
  return bench;
}

// Seconds of the counted part of one run.
absl::StatusOr<double> OfflineBench::Once(int sequences, int prompt, int output) {
  const int vocab = loaded_.model->spec().vocab;
  absl::BlockingCounter left(sequences);
  absl::Mutex mu;
  absl::Status failed;
  double slowest = 0;
  const absl::Time begin = absl::Now();
  for (int s = 0; s < sequences; ++s) {
    Request request;
    request.id = absl::StrCat("bench-", ++runs_);
    for (int i = 0; i < prompt; ++i) request.prompt.push_back((i * 7919 + s * 104729) % vocab);
    request.sampling.temperature = 0;
    request.stopping.max_tokens = output;
    request.stopping.ignore_eos = true;
    const absl::Status status = engine_->Submit(std::move(request), [&](Event event) {
      if (event.kind != Event::Kind::kFinished) return;
      {
        absl::MutexLock lock(&mu);
        if (!event.status.ok()) failed = event.status;
        slowest = std::max(slowest, absl::ToDoubleSeconds(event.timings.decode));
      }
      left.DecrementCount();
    });
    if (!status.ok()) {
      absl::MutexLock lock(&mu);
      failed = status;
      left.DecrementCount();
    }
  }
  left.Wait();
  const double whole = absl::ToDoubleSeconds(absl::Now() - begin);
  engine_->WaitIdle(absl::Seconds(1));
  if (!failed.ok()) return failed;
  return output == 1 ? whole : slowest;
}

absl::StatusOr<Phase> OfflineBench::Measure(std::string name, int sequences, int prompt,
                                            int output) {
  Phase phase;
  phase.name = std::move(name);
  if (auto warm = Once(sequences, prompt, output); !warm.ok()) return warm.status();
  const OpCounts before = ReadProfile(*backend_);
  std::vector<double> seconds;
  for (int i = 0; i < options_.repeats; ++i) {
    auto once = Once(sequences, prompt, output);
    if (!once.ok()) return once.status();
    seconds.push_back(*once);
  }
  std::sort(seconds.begin(), seconds.end());
  const double tokens =
      output == 1 ? double{1} * sequences * prompt : double{1} * sequences * (output - 1);
  phase.tokens_per_second = tokens / seconds[seconds.size() / 2];
  phase.ops = ReadProfile(*backend_);
  for (size_t i = 0; i < phase.ops.size(); ++i) {
    phase.ops[i].calls -= before[i].calls;
    phase.ops[i].nanoseconds -= before[i].nanoseconds;
    phase.ops[i].bytes -= before[i].bytes;
    phase.ops[i].flops -= before[i].flops;
  }
  return phase;
}

void PrintPhase(const Phase& phase, bool ops) {
  std::cout << absl::StreamFormat("%-28s %10.1f tokens/s\n", phase.name, phase.tokens_per_second);
  if (!ops) return;
  int64_t total = 0;
  for (const OpCount& op : phase.ops) total += op.nanoseconds;
  for (int i = 0; i < kOpCount; ++i) {
    const OpCount& op = phase.ops[i];
    if (op.calls == 0) continue;
    const double ns = static_cast<double>(std::max<int64_t>(op.nanoseconds, 1));
    std::cout << absl::StreamFormat(
        "    %-16s %8d calls %10.1f us each %6.1f%% of time %8.2f GB/s %9.2f GOP/s\n",
        OpName(static_cast<OpId>(i)), op.calls, ns / 1e3 / static_cast<double>(op.calls),
        100 * ns / static_cast<double>(std::max<int64_t>(total, 1)), op.bytes / ns, op.flops / ns);
  }
}

ordered_json PhaseJson(const Phase& phase) {
  ordered_json ops = ordered_json::object();
  for (int i = 0; i < kOpCount; ++i) {
    const OpCount& op = phase.ops[i];
    if (op.calls == 0) continue;
    ops[OpName(static_cast<OpId>(i))] = {{"calls", op.calls},
                                         {"nanoseconds", op.nanoseconds},
                                         {"bytes", op.bytes},
                                         {"flops", op.flops}};
  }
  return {{"name", phase.name}, {"tokens_per_second", phase.tokens_per_second}, {"ops", ops}};
}

int RunOffline(const BenchOptions& options) {
  auto bench = OfflineBench::Open(options);
  if (!bench.ok()) {
    std::cerr << "longspan bench: " << bench.status().message() << "\n";
    return 1;
  }
  struct Work {
    std::string name;
    int sequences, prompt, output;
  };
  std::vector<Work> works;
  for (const int64_t prompt : options.prompts) {
    if (prompt < 1 || prompt >= (*bench)->max_context()) {
      std::cerr << "longspan bench: --prompts: " << prompt << " is out of range, the context is "
                << (*bench)->max_context() << " tokens\n";
      return 2;
    }
    works.push_back({absl::StrCat("prefill ", prompt), 1, static_cast<int>(prompt), 1});
  }
  works.push_back({"decode, 1 sequence", 1, 32, options.tokens + 1});
  works.push_back({absl::StrCat("decode, ", options.batch, " sequences"), options.batch, 32,
                   options.tokens + 1});
  ordered_json phases = ordered_json::array();
  if (!options.json) std::cout << (*bench)->Title() << "\n";
  for (const Work& work : works) {
    auto phase = (*bench)->Measure(work.name, work.sequences, work.prompt, work.output);
    if (!phase.ok()) {
      std::cerr << "longspan bench: " << phase.status().message() << "\n";
      return 1;
    }
    if (options.json) {
      phases.push_back(PhaseJson(*phase));
    } else {
      PrintPhase(*phase, options.ops);
    }
  }
  if (options.json) {
    std::cout << ordered_json{{"machine", (*bench)->Title()}, {"phases", phases}}.dump(2) << "\n";
  }
  return 0;
}

// --- Against a server
// ------------------------------------------------------------------------------

struct Load {
  absl::Mutex mu;
  int next ABSL_GUARDED_BY(mu) = 0;
  std::vector<double> first ABSL_GUARDED_BY(mu), between ABSL_GUARDED_BY(mu);
  int64_t tokens ABSL_GUARDED_BY(mu) = 0;
  grpc::Status failed ABSL_GUARDED_BY(mu);
};

void OneRequest(v1::InferenceService::Stub& stub, const BenchOptions& options, uint32_t vocab,
                int number, Load& load) {
  v1::StreamCompleteRequest request;
  auto* ids = request.mutable_request()->mutable_token_ids();
  for (int64_t i = 0; i < options.prompts[0]; ++i) {
    ids->add_ids(static_cast<uint32_t>((i * 7919 + number * 104729LL) % vocab));
  }
  request.mutable_request()->mutable_sampling()->set_temperature(0);
  request.mutable_request()->mutable_stopping()->set_max_tokens(options.tokens);
  request.mutable_request()->mutable_stopping()->set_ignore_eos(true);
  request.mutable_request()->mutable_output()->set_return_token_ids(true);
  grpc::ClientContext context;
  absl::Time last = absl::Now();
  auto reader = stub.StreamComplete(&context, request);
  v1::StreamCompleteResponse message;
  bool first = true;
  while (reader->Read(&message)) {
    const int tokens = message.delta().token_ids_size();
    if (tokens == 0) continue;
    const absl::Time now = absl::Now();
    absl::MutexLock lock(&load.mu);
    if (first) {
      load.first.push_back(absl::ToDoubleSeconds(now - last));
    } else {
      // Tokens that came together share the time since the last message.
      load.between.insert(load.between.end(), tokens, absl::ToDoubleSeconds(now - last) / tokens);
    }
    load.tokens += tokens;
    first = false;
    last = now;
  }
  const grpc::Status status = reader->Finish();
  absl::MutexLock lock(&load.mu);
  if (!status.ok()) load.failed = status;
}

double PercentileOf(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1,
                         static_cast<size_t>(share * static_cast<double>(values.size())))];
}

int RunAgainstServer(const BenchOptions& options) {
  const auto channel = cli::Connect(options.server);
  v1::GetModelResponse model;
  grpc::ClientContext context;
  if (const auto status = v1::ModelService::NewStub(channel)->GetModel(&context, {}, &model);
      !status.ok()) {
    return cli::Fail("bench", status);
  }
  const auto stub = v1::InferenceService::NewStub(channel);
  Load load;
  const absl::Time begin = absl::Now();
  std::vector<std::thread> workers;
  for (int w = 0; w < options.concurrency; ++w) {
    workers.emplace_back([&] {
      while (true) {
        int number = 0;
        {
          absl::MutexLock lock(&load.mu);
          if (load.next >= options.requests || !load.failed.ok()) return;
          number = load.next++;
        }
        OneRequest(*stub, options, model.model().vocab_size(), number, load);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  absl::MutexLock lock(&load.mu);
  if (!load.failed.ok()) return cli::Fail("bench", load.failed);
  ordered_json result = {
      {"model", model.model().id()},
      {"requests", options.requests},
      {"concurrency", options.concurrency},
      {"prompt_tokens", options.prompts[0]},
      {"seconds", seconds},
      {"requests_per_second", options.requests / seconds},
      {"generated_tokens_per_second", static_cast<double>(load.tokens) / seconds}};
  for (const double p : {0.5, 0.9, 0.99}) {
    const int percent = static_cast<int>(std::lround(p * 100));
    result[absl::StrCat("ttft_ms_p", percent)] = PercentileOf(load.first, p) * 1e3;
    result[absl::StrCat("itl_ms_p", percent)] = PercentileOf(load.between, p) * 1e3;
  }
  if (options.json) {
    std::cout << result.dump(2) << "\n";
  } else {
    for (const auto& [name, value] : result.items()) {
      std::cout << absl::StreamFormat("%-28s ", name)
                << (value.is_number_float() ? absl::StrFormat("%.2f", value.get<double>())
                    : value.is_string()     ? value.get<std::string>()
                                            : value.dump())
                << "\n";
    }
  }
  return 0;
}

}  // namespace

int RunBench(int argc, char** argv) {
  BenchOptions options;
  Flags flags("bench", "[flags]",
              "Measures a model without a server: prefill, decode, and each op's time, bytes and "
              "operations. With --server: latencies of a live server under load.");
  flags.String("model", &options.model, "PATH", "checkpoint; empty is the default model");
  flags.Ints("prompts", &options.prompts, "N,N,...", "prompt lengths; --server uses the first");
  flags.Int("tokens", &options.tokens, "tokens to generate for each sequence", 2);
  flags.Int("threads", &options.threads, "0: one per core that the process may run on");
  flags.Int("batch", &options.batch, "sequences of the batched decode", 1, 64);
  flags.Int("repeats", &options.repeats, "the median of them is told", 1);
  flags.Int("max-batched-tokens", &options.max_batched_tokens, "tokens of one step", 1);
  flags.Choice("kv-dtype", &options.kv_dtype, {"bf16", "f32"}, "type of cached keys and values");
  flags.Bool("ops", &options.ops, "show each op");
  flags.Section("Against a server");
  flags.String("server", &options.server, "HOST:PORT", "measure this server instead");
  flags.Int("requests", &options.requests, "how many in all", 1);
  flags.Int("concurrency", &options.concurrency, "how many at once", 1, 1024);
  flags.Bool("json", &options.json, "print one JSON object instead");
  flags.Epilogue(
      "Examples:\n"
      "  longspan bench --threads 2\n"
      "  longspan bench --server 127.0.0.1:50051 --prompts 512 --concurrency 16 --requests 200");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  if (options.prompts.empty()) {
    std::cerr << "longspan bench: --prompts is empty\n";
    return 2;
  }
  return options.server.empty() ? RunOffline(options) : RunAgainstServer(options);
}

}  // namespace longspan
