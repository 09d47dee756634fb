#pragma once
// What `longspan bench` measures: a model in this process, or a server under load. Each prints its
// figures to stdout and returns the process's exit status.
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/engine.h"
#include "server/cli_client.h"
#include "server/device.h"

namespace longspan {

// Sequences of one length; `count` is 0 where it was not told.
struct BenchItem {
  int count = 0;
  int tokens = 0;
};
// "512,32x2k": one of 512 tokens and 32 of 2,048. InvalidArgument names the item.
absl::StatusOr<std::vector<BenchItem>> ParseBenchItems(absl::string_view text);

struct BenchOptions {
  cli::Target target;
  std::string model, shape, weights = "bf16", device = "cpu", kv_dtype = "bf16", simd = kBestSimd;
  std::vector<BenchItem> prompts, contexts;
  std::vector<int64_t> batches = {1, 8};
  int64_t cache_bytes = 0;
  int max_context = 0, page_tokens = 16;
  int tokens = 64, repeats = 3, threads = 0, max_batched_tokens = 512;
  int requests = 64, concurrency = 8;
  std::string attention_metrics = "head";  // and every: EngineOptions::spans and span_every
  int attention_sample_every = EngineOptions().span_every;
  bool json = false, ops = true, deterministic = false;
};

int BenchModel(const BenchOptions& options);
int BenchServer(const BenchOptions& options);

}  // namespace longspan
