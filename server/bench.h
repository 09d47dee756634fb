#pragma once
// What `longspan bench` measures: a model in this process, or a server under load. Each prints its
// figures to stdout and returns the process's exit status.
#include <cstdint>
#include <string>
#include <vector>

#include "server/cli_client.h"

namespace longspan {

struct BenchOptions {
  cli::Target target;
  std::string model, device = "cpu", kv_dtype = "bf16";
  std::vector<int64_t> prompts = {128, 512, 2048}, contexts = {32}, batches = {1, 8};
  int tokens = 64, repeats = 3, threads = 0, max_batched_tokens = 512;
  int requests = 64, concurrency = 8;
  bool json = false, ops = true;
};

int BenchModel(const BenchOptions& options);
int BenchServer(const BenchOptions& options);

}  // namespace longspan
