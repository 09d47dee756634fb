// longspan bench: how fast a model is, op by op, without a server; or how fast a server answers.
#include <iostream>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/bench.h"
#include "server/cli.h"
#include "server/flags.h"

namespace longspan {

absl::StatusOr<std::vector<BenchItem>> ParseBenchItems(absl::string_view text) {
  constexpr int64_t kMostTokens = 1 << 24, kMostSequences = 4096;
  std::vector<BenchItem> items;
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const size_t x = part.find('x');
    const bool counted = x != absl::string_view::npos;
    const auto count = counted ? ParseSize(part.substr(0, x)) : 0;
    const auto tokens = ParseSize(counted ? part.substr(x + 1) : part);
    if (!count.ok() || *count < (counted ? 1 : 0) || *count > kMostSequences || !tokens.ok() ||
        *tokens < 1 || *tokens > kMostTokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", part, "' is neither a number of tokens from 1 to ", kMostTokens,
                       " nor COUNTxTOKENS with a count from 1 to ", kMostSequences));
    }
    items.push_back({static_cast<int>(*count), static_cast<int>(*tokens)});
  }
  return items;
}

int RunBench(int argc, char** argv) {
  BenchOptions options;
  std::string prompts = "128,512,2k", contexts = "32";
  Flags flags("bench", "[flags]",
              "Measures a model without a server: prefill, decode, and each op's time, bytes and "
              "operations. With --server: latencies of a live server under load.");
  flags.String("model", &options.model, "PATH", "checkpoint; empty is the default model");
  flags.String("shape", &options.shape, "NAME|PATH",
               "random weights in the shape of a public model (gemma3-4b, gemma3-27b, "
               "gpt-oss-20b-attention) or of a config.json, instead of a checkpoint");
  flags.Choice("weights", &options.weights, {"bf16", "q8_0", "q4_k"}, "type of --shape's matrices");
  flags.String("prompts", &prompts, "N,CxN,...",
               "prompt lengths; 32x2k: 32 prompts at once; --server uses the first");
  flags.Int("tokens", &options.tokens, "tokens to generate for each sequence", 2);
  flags.String("device", &options.device, "cpu|cuda:N", "where it runs");
  flags.Int("threads", &options.threads, "0: one per core that the process may run on");
  SimdFlag(flags, &options.simd);
  flags.String("contexts", &contexts, "N,CxN,...",
               "tokens read before decoding; 32x32k: with 32 sequences only");
  flags.Ints("batches", &options.batches, "N,N,...", "sequences that decode together");
  flags.Int("repeats", &options.repeats, "the median of them is told", 1);
  flags.Int("max-batched-tokens", &options.max_batched_tokens, "tokens of one step", 1);
  flags.Int("max-context", &options.max_context, "0 is the model's", 0);
  flags.Bytes("cache-bytes", &options.cache_bytes,
              "cache memory; 0 is what serve takes, on a GPU 0.9 of what the weights leave");
  flags.Int("page-tokens", &options.page_tokens, "tokens of a cache page, as in serve", 1, 1024);
  KvDtypeFlag(flags, &options.kv_dtype);
  flags.Bool("deterministic", &options.deterministic, "as in serve: what it costs on a GPU");
  flags.Choice("attention-metrics", &options.attention_metrics, {"off", "layer", "head"},
               "attention spans, as in serve");
  flags.Int("attention-sample-every", &options.attention_sample_every,
            "observe one decode step in N", 1);
  flags.Bool("ops", &options.ops,
             "show each op, timed in one more repetition of each kind of work");
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
      "  longspan bench --device cuda:0 --shape gemma3-4b --prompts 32x2k --contexts 2k,32x32k\n"
      "  longspan bench --server 127.0.0.1:50051 --prompts 512 --concurrency 16 --requests 200");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  const auto wrong = [](absl::string_view message) {
    std::cerr << "longspan bench: " << message << "\n";
    return 2;
  };
  for (const auto& [name, text, items] : {std::tuple{"prompts", prompts, &options.prompts},
                                          {"contexts", contexts, &options.contexts}}) {
    auto parsed = ParseBenchItems(text);
    if (!parsed.ok()) return wrong(absl::StrCat("--", name, ": ", parsed.status().message()));
    *items = *std::move(parsed);
  }
  for (const int64_t batch : options.batches) {
    if (batch < 1 || batch > 4096) {
      return wrong(absl::StrCat("--batches has ", batch, ", must be from 1 to 4096"));
    }
  }
  if (options.cache_bytes < 0) return wrong("--cache-bytes must not be negative");
  return options.target.server.empty() ? BenchModel(options) : BenchServer(options);
}

}  // namespace longspan
