#include "server/config.h"

#include <filesystem>
#include <set>

#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/flags.h"

namespace longspan {

std::optional<int> ReadConfig(int argc, char** argv, ServerConfig* config) {
  ServerConfig& c = *config;
  Flags flags(
      "serve", "[flags]",
      "Serves a hybrid language model over gRPC, with metrics over HTTP. Without --model it "
      "serves the small default model that comes with Longspan.");
  flags.Section("Model");
  flags.String("model", &c.model, "PATH", "a Hugging Face directory or a .gguf file");
  flags.Strings("model-name", &c.names, "NAME", "what clients call it; repeat for aliases");
  flags.String("device", &c.device, "cpu|cuda:N", "where it runs");
  flags.Int("threads", &c.threads, "CPU threads; 0 is one per usable core", 0, 1024);
  SimdFlag(flags, &c.simd);
  KvDtypeFlag(flags, &c.kv_dtype);
  flags.Bool(
      "deterministic", &c.deterministic,
      "a request's tokens are the same to the bit whatever else runs; slower on a GPU, a CPU "
      "always is so");
  flags.Section("Addresses");
  flags.String("grpc", &c.grpc, "HOST:PORT", "gRPC; port 0 picks a free one");
  flags.String("http", &c.http, "HOST:PORT", "/metrics, /health, /version; empty turns it off");
  flags.Section("Keys and certificates");
  flags.String("api-key-file", &c.api_key_file, "FILE",
               "asks every caller for one of its keys, one a line: KEY [name=NAME] [admin] "
               "[max-requests=N] [tokens-per-minute=N]; read again when it changes");
  flags.Bool("insecure", &c.insecure,
             "listen on addresses that others reach without asking for keys");
  flags.String("ssl-certfile", &c.tls.certfile, "FILE",
               "PEM; gRPC over TLS; read again when it changes");
  flags.String("ssl-keyfile", &c.tls.keyfile, "FILE", "its private key");
  flags.String("ssl-ca-certs", &c.tls.ca_certs, "FILE", "who signs clients' certificates");
  flags.Int("ssl-cert-reqs", &c.tls.cert_reqs,
            "a client's certificate: 0 not asked for, 1 optional, 2 required", 0, 2);
  flags.Section("Scheduling and memory");
  flags.Int(
      "max-batched-tokens", &c.max_batched_tokens,
      "tokens of one step; more reads prompts faster and makes others' next tokens wait longer", 1,
      65536);
  flags.Int("max-running", &c.max_running, "sequences that hold cache at once", 1, 4096);
  flags.Int("max-queued-requests", &c.max_queued_requests, "beyond it requests are refused", 1);
  flags.Int64("max-queued-tokens", &c.max_queued_tokens, "the same, in prompt tokens", 1);
  flags.Int("max-context", &c.max_context, "prompt and answer together; 0 is the model's", 0);
  flags.Int("page-tokens", &c.page_tokens, "tokens of a cache page", 1, 1024);
  flags.Double("memory-fraction", &c.memory_fraction,
               "on a GPU, the share of the memory that the weights leave free to use as cache");
  flags.Bytes("cache-bytes", &c.cache_bytes,
              "cache memory; 0 is 512M or one whole context if more, on a GPU --memory-fraction");
  flags.Section("Attention spans");
  flags.Choice("attention-metrics", &c.attention_metrics, {"off", "layer", "head"},
               "what /metrics/attention shows; off computes nothing");
  flags.Int("attention-sample-every", &c.attention_sample_every, "observe one decode step in N", 1);
  flags.Choice("metrics-compat", &c.metrics_compat, {"vllm", "none"},
               "also export the vllm: series that routers and autoscalers read");
  flags.Section("Limits and ends");
  flags.Bytes("max-message-bytes", &c.max_message_bytes, "largest gRPC message received");
  flags.Bytes("max-prompt-bytes", &c.max_prompt_bytes, "largest prompt text");
  flags.Int("max-concurrent-streams", &c.max_concurrent_streams, "calls on one connection", 1);
  flags.Bytes("max-header-bytes", &c.max_header_bytes, "metadata of one call");
  flags.Duration("max-connection-age", &c.max_connection_age,
                 "an older connection takes no new calls, so that clients that balance by name "
                 "find new replicas; 5m suits them");
  flags.Duration("max-connection-age-grace", &c.max_connection_age_grace,
                 "time for the calls of such a connection to finish");
  flags.Duration("keepalive-time", &c.keepalive_time,
                 "a peer that was silent so long is pinged, and let go if it does not answer");
  flags.Duration("stall-timeout", &c.stall_timeout,
                 "a reader that takes nothing is cut off after it");
  flags.Duration("withdrawal-grace", &c.withdrawal_grace,
                 "after SIGTERM, time not ready before new requests are refused");
  flags.Duration("shutdown-timeout", &c.shutdown_timeout,
                 "after SIGTERM, time for accepted requests to finish");
  flags.Choice("log-level", &c.log_level, {"debug", "info", "warning", "error"},
               "what is logged to stderr; prompts and answers never are");
  flags.Choice("log-format", &c.log_format, {"text", "json"}, "json is one object a line");
  flags.Int("log-prompt-bytes", &c.log_prompt_bytes,
            "of each prompt's beginning, in a line of its own; 0 logs no prompt's text", 0,
            1 << 20);
  flags.Epilogue(
      "Examples:\n"
      "  longspan serve\n"
      "  longspan serve --model models/downloads/gemma-3-270m.gguf --threads 8 --cache-bytes 2G\n"
      "  LONGSPAN_GRPC=0.0.0.0:50051 longspan serve --api-key-file keys.txt");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return exit;
  return std::nullopt;
}

namespace {

// HOST:PORT, or PORT alone for every address.
bool IsLoopback(absl::string_view address) {
  if (absl::StartsWith(address, "unix:")) return true;
  const size_t colon = address.rfind(':');
  if (colon == absl::string_view::npos) return false;
  const absl::string_view host = address.substr(0, colon);
  return host == "localhost" || host == "[::1]" ||
         (absl::StartsWith(host, "127.") &&
          host.find_first_not_of("0123456789.") == absl::string_view::npos);
}

absl::Status CheckAddress(absl::string_view flag, absl::string_view address) {
  if (address.empty() || absl::StartsWith(address, "unix:")) return absl::OkStatus();
  int port = -1;
  const size_t colon = address.rfind(':');
  if (!absl::SimpleAtoi(address.substr(colon == absl::string_view::npos ? 0 : colon + 1), &port) ||
      port < 0 || port > 65535) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--", flag, " is '", address, "', must be HOST:PORT with a port from 0 to 65535"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const ServerConfig& c) {
  for (const auto& [flag, address] : {std::pair("grpc", c.grpc), {"http", c.http}}) {
    if (absl::Status valid = CheckAddress(flag, address); !valid.ok()) return valid;
    if (address.empty() || IsLoopback(address) || !c.api_key_file.empty() || c.insecure) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, " ", address, " is reached from other machines: give ",
                     "--api-key-file, or --insecure if something in front asks for keys"));
  }
  for (const auto& [flag, value] : {std::pair("max-connection-age", c.max_connection_age),
                                    {"keepalive-time", c.keepalive_time}}) {
    if (value < absl::Seconds(1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag, " is ", absl::FormatDuration(value), ", must be at least 1s"));
    }
  }
  if (c.max_header_bytes < 1024 || c.max_header_bytes > (1 << 20)) {
    return absl::InvalidArgumentError(absl::StrCat("--max-header-bytes is ", c.max_header_bytes,
                                                   ", must be from 1024 to ", 1 << 20));
  }
  if (c.stall_timeout <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("--stall-timeout must be more than 0");
  }
  if (c.max_message_bytes < 1 || c.max_message_bytes > INT32_MAX) {
    return absl::InvalidArgumentError(absl::StrCat("--max-message-bytes is ", c.max_message_bytes,
                                                   ", must be from 1 to ", INT32_MAX));
  }
  if (c.cache_bytes < 0) return absl::InvalidArgumentError("--cache-bytes must not be negative");
  return absl::OkStatus();
}

SpanLevel LevelOf(absl::string_view attention_metrics) {
  if (attention_metrics == "off") return SpanLevel::kOff;
  return attention_metrics == "layer" ? SpanLevel::kLayer : SpanLevel::kHead;
}

namespace {

// `folder`, which holds `file`, among the places where what is shipped may lie.
absl::StatusOr<std::string> FindShipped(const char* folder, const char* file) {
  std::error_code error;
  const std::filesystem::path binary = std::filesystem::read_symlink("/proc/self/exe", error);
  std::vector<std::string> looked;
  for (const char* place : {".", "../../models", "../share/longspan"}) {
    const auto path = (binary.parent_path() / place / folder).lexically_normal();
    if (std::filesystem::exists(path / file, error)) return path.string();
    looked.push_back(path.string());
  }
  return absl::NotFoundError(absl::StrJoin(looked, ", "));
}

}  // namespace

absl::StatusOr<std::string> DefaultModelPath() {
  auto path = FindShipped("default", "config.json");
  if (path.ok()) return path;
  return absl::NotFoundError(
      absl::StrCat("the default model is not at ", path.status().message(), "; use --model"));
}

absl::StatusOr<std::string> HaystackPath() {
  auto path = FindShipped("haystack", "essay.txt");
  if (path.ok()) return *path + "/essay.txt";
  return absl::NotFoundError(absl::StrCat("the essay haystack is not at ", path.status().message(),
                                          "; use noise, or send a text"));
}

absl::StatusOr<std::string> ShapePath(const std::string& shape) {
  std::error_code error;
  if (absl::StrContains(shape, '/') || absl::EndsWith(shape, ".json")) {
    return std::filesystem::is_directory(shape, error) ? shape + "/config.json" : shape;
  }
  const auto folder = FindShipped("shapes", "");
  if (!folder.ok()) {
    return absl::NotFoundError(
        absl::StrCat("the shapes are not at ", folder.status().message(), "; name a config.json"));
  }
  std::set<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(*folder, error)) {
    if (entry.path().extension() == ".json") names.insert(entry.path().stem());
  }
  if (names.contains(shape)) return absl::StrCat(*folder, "/", shape, ".json");
  return absl::NotFoundError(absl::StrCat("no shape is called '", shape, "'; there are ",
                                          absl::StrJoin(names, ", "), ", and any config.json"));
}

}  // namespace longspan
