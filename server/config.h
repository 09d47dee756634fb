#pragma once
// Everything that `serve` can be told, in one struct with its defaults and their reasons.
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "server/device.h"
#include "server/tls.h"

namespace longspan {

struct ServerConfig {
  std::string model;               // "": the default model
  std::vector<std::string> names;  // of the served model; empty: what the checkpoint calls itself
  std::string device = "cpu";      // or "cuda:N"
  std::string grpc =
      "127.0.0.1:50051";  // loopback: nobody else reaches a server that asks for no keys
  std::string http = "127.0.0.1:8000";  // "": no HTTP
  std::string api_key_file;             // "": nobody is asked for a key
  bool insecure = false;                // lets others reach a server that asks for no keys
  ServerTls tls;
  int threads = 0;                // 0: one per core that the process may run on
  std::string simd = kBestSimd;   // DeviceOptions::simd
  bool deterministic = false;     // CudaOptions::deterministic
  std::string kv_dtype = "bf16";  // as KvDtypeOf()
  int max_batched_tokens = 512;   // a step: long enough to fill a core, short enough to decode
  int max_running = 64;
  int max_queued_requests = 1024;
  int64_t max_queued_tokens = 8 << 20;
  int max_context = 0;  // 0: the model's
  int page_tokens = 16;
  int64_t cache_bytes = 0;                 // 0: 512 MiB, or one context if that is more
  double memory_fraction = 0.9;            // of a GPU's free memory, if cache_bytes is 0
  std::string attention_metrics = "head";  // off | layer | head
  int attention_sample_every = 16;         // decode steps; 1 observes each
  std::string metrics_compat = "vllm";     // or "none"
  // A million packed token ids are 3-4 MB; above 64 MiB, so that a prompt of 64 MiB is still
  // answered by us, with the field's name.
  int64_t max_message_bytes = 65 << 20;
  int64_t max_prompt_bytes = 8 << 20;   // checked before tokenizing, which takes seconds for 8 MiB
  int max_concurrent_streams = 1024;    // of one connection
  int64_t max_header_bytes = 16 << 10;  // of one call: a key, a trace and an id fit often
  // Clients that balance by name look it up again only when they connect anew.
  absl::Duration max_connection_age = absl::InfiniteDuration();
  absl::Duration max_connection_age_grace = absl::Minutes(10);  // for calls of an old connection
  absl::Duration keepalive_time = absl::Minutes(1);        // silence after which a peer is pinged
  std::string log_level = "info";                          // debug | info | warning | error
  std::string log_format = "text";                         // or "json"
  int log_prompt_bytes = 0;                                // of each prompt; 0: none
  absl::Duration stall_timeout = absl::Seconds(30);        // of a reader that takes nothing
  absl::Duration withdrawal_grace = absl::ZeroDuration();  // from "not ready" to refusing requests
  absl::Duration shutdown_timeout = absl::Seconds(45);     // for accepted requests to finish
};

// Fills *config from flags and environment; the exit status if the process should end now.
std::optional<int> ReadConfig(int argc, char** argv, ServerConfig* config);
// InvalidArgument naming the flag.
absl::Status Validate(const ServerConfig& config);
SpanLevel LevelOf(absl::string_view attention_metrics);  // one of off, layer, head

// The shipped model: default/ beside the binary, ../../models/default (from a build folder) or
// ../share/longspan/default (installed). NotFound lists where it looked.
absl::StatusOr<std::string> DefaultModelPath();
// The shipped haystack text, essay.txt in haystack/ at the same places.
absl::StatusOr<std::string> HaystackPath();
// The config.json of a shape: `shape` itself where it is a path, else shapes/NAME.json at the same
// places. NotFound lists the names that there are.
absl::StatusOr<std::string> ShapePath(const std::string& shape);

}  // namespace longspan
