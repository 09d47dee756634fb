// longspan bench: how fast a model is, op by op, without a server; or how fast a server answers.
#include <algorithm>
#include <iostream>

#include "server/bench.h"
#include "server/cli.h"
#include "server/flags.h"

namespace longspan {

int RunBench(int argc, char** argv) {
  BenchOptions options;
  Flags flags("bench", "[flags]",
              "Measures a model without a server: prefill, decode, and each op's time, bytes and "
              "operations. With --server: latencies of a live server under load.");
  flags.String("model", &options.model, "PATH", "checkpoint; empty is the default model");
  flags.Ints("prompts", &options.prompts, "N,N,...", "prompt lengths; --server uses the first");
  flags.Int("tokens", &options.tokens, "tokens to generate for each sequence", 2);
  flags.String("device", &options.device, "cpu|cuda:N", "where it runs");
  flags.Int("threads", &options.threads, "0: one per core that the process may run on");
  flags.Ints("contexts", &options.contexts, "N,N,...", "tokens read before decoding");
  flags.Ints("batches", &options.batches, "N,N,...", "sequences that decode together");
  flags.Int("repeats", &options.repeats, "the median of them is told", 1);
  flags.Int("max-batched-tokens", &options.max_batched_tokens, "tokens of one step", 1);
  flags.Choice("kv-dtype", &options.kv_dtype, {"bf16", "f32"}, "type of cached keys and values");
  flags.Bool("ops", &options.ops, "show each op");
  flags.Section("Against a server");
  options.target.server.clear();  // none unless told
  cli::TargetFlags(flags, &options.target);
  flags.Variable("server", "LONGSPAN_BENCH_SERVER");  // LONGSPAN_SERVER would end benches of models
  flags.Int("requests", &options.requests, "how many in all", 1);
  flags.Int("concurrency", &options.concurrency, "how many at once", 1, 1024);
  flags.Bool("json", &options.json, "print one JSON object instead");
  flags.Epilogue(
      "Examples:\n"
      "  longspan bench --threads 2\n"
      "  longspan bench --server 127.0.0.1:50051 --prompts 512 --concurrency 16 --requests 200");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  for (const auto& [name, values] : {std::pair{"prompts", &options.prompts},
                                     {"contexts", &options.contexts},
                                     {"batches", &options.batches}}) {
    constexpr int64_t kMost = 1 << 24;
    const bool valid =
        !values->empty() &&
        std::all_of(values->begin(), values->end(), [](int64_t v) { return v >= 1 && v <= kMost; });
    if (valid) continue;
    std::cerr << "longspan bench: --" << name << " must be numbers from 1 to " << kMost << "\n";
    return 2;
  }
  return options.target.server.empty() ? BenchModel(options) : BenchServer(options);
}

}  // namespace longspan
