// longspan tokenize, models, health, drain: one question, one answer.
#include <iostream>
#include <iterator>

#include "absl/strings/escaping.h"
#include "absl/strings/str_format.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "longspan/v1/admin.grpc.pb.h"
#include "longspan/v1/inference.grpc.pb.h"
#include "server/cli.h"
#include "server/cli_client.h"

namespace longspan {

using cli::Connect;
using cli::Fail;
using cli::ToJson;

int RunTokenize(int argc, char** argv) {
  cli::Target target;
  std::string text;
  bool json = false;
  Flags flags("tokenize", "[flags] [TEXT]", "Shows the tokens of a text (or of standard input).");
  cli::TargetFlags(flags, &target);
  flags.Bool("json", &json, "ids and pieces as one JSON object");
  std::vector<std::string> words;
  if (auto exit = flags.Parse(argc, argv, &words); exit.has_value()) return *exit;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  if (words.empty()) text.assign(std::istreambuf_iterator<char>(std::cin), {});
  v1::TokenizeRequest request;
  request.set_text(text);
  request.set_return_pieces(true);
  v1::TokenizeResponse response;
  grpc::ClientContext context;
  auto stub = v1::InferenceService::NewStub(Connect(target));
  if (const auto status = stub->Tokenize(&context, request, &response); !status.ok()) {
    return Fail("tokenize", status);
  }
  if (json) {
    std::cout << ToJson(response, true) << "\n";
    return 0;
  }
  for (int i = 0; i < response.token_ids_size(); ++i) {
    std::cout << absl::StreamFormat("%7d  \"%s\"\n", response.token_ids(i),
                                    absl::Utf8SafeCEscape(response.pieces(i)));
  }
  return 0;
}

int RunModels(int argc, char** argv) {
  cli::Target target;
  bool json = false;
  Flags flags("models", "[flags]", "Lists what a server serves.");
  cli::TargetFlags(flags, &target);
  flags.Bool("json", &json, "everything that the server says, as JSON");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  v1::ListModelsResponse response;
  grpc::ClientContext context;
  auto stub = v1::ModelService::NewStub(Connect(target));
  if (const auto status = stub->ListModels(&context, {}, &response); !status.ok()) {
    return Fail("models", status);
  }
  if (json) {
    std::cout << ToJson(response, true) << "\n";
    return 0;
  }
  for (const v1::Model& m : response.items()) {
    int full = 0;
    for (const auto& layer : m.layers()) full += layer.kind() == v1::LAYER_KIND_FULL;
    std::cout << absl::StreamFormat(
        "%s  %s, %.1fM parameters (%s), %d layers (%d full), context %d, vocabulary %d\n", m.id(),
        m.architecture(), m.num_parameters() / 1e6, m.dtype(), m.layers_size(), full,
        m.max_model_len(), m.vocab_size());
  }
  return 0;
}

int RunHealth(int argc, char** argv) {
  cli::Target target;
  absl::Duration timeout = absl::Seconds(5);
  bool json = false;
  Flags flags("health", "[flags]", "Exits 0 if a server is ready for requests, else 1.");
  cli::TargetFlags(flags, &target);
  flags.Duration("timeout", &timeout, "how long to wait for an answer");
  flags.Bool("json", &json, "as one JSON object: ready and, where it is told, the load");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  const auto deadline = std::chrono::system_clock::now() + absl::ToChronoMilliseconds(timeout);
  const auto channel = Connect(target);
  grpc::health::v1::HealthCheckRequest question;
  question.set_service(v1::InferenceService::service_full_name());
  grpc::health::v1::HealthCheckResponse answer;
  grpc::ClientContext health_context, load_context;
  health_context.set_deadline(deadline);
  load_context.set_deadline(deadline);
  auto health = grpc::health::v1::Health::NewStub(channel);
  if (const auto status = health->Check(&health_context, question, &answer); !status.ok()) {
    return Fail("health", status);
  }
  const bool ready = answer.status() == grpc::health::v1::HealthCheckResponse::SERVING;
  v1::GetLoadResponse load;
  // Health is open; where keys are asked for, the load is told to admins.
  const bool told = v1::AdminService::NewStub(channel)->GetLoad(&load_context, {}, &load).ok();
  if (json) {
    std::cout << "{\"ready\":" << (ready ? "true" : "false")
              << (told ? ",\"load\":" + ToJson(load, false) : "") << "}\n";
    return ready ? 0 : 1;
  }
  std::cout << (ready ? "ready" : "not ready");
  if (told) {
    std::cout << ": " << load.running_requests() << " running, " << load.queued_requests()
              << " waiting, " << load.used_cache_bytes() << " of " << load.total_cache_bytes()
              << " cache bytes used";
  }
  std::cout << "\n";
  return ready ? 0 : 1;
}

int RunDrain(int argc, char** argv) {
  cli::Target target;
  absl::Duration grace = absl::InfiniteDuration();
  bool shutdown = false, resume = false, jsonl = false;
  Flags flags("drain", "[flags]",
              "Lets a server finish its work: it refuses new requests and reports what remains.");
  cli::TargetFlags(flags, &target);
  flags.Duration("grace", &grace, "abort what is left after it");
  flags.Bool("shutdown", &shutdown, "exit when done");
  flags.Bool("resume", &resume, "take requests again instead");
  flags.Bool("jsonl", &jsonl, "what remains as JSON lines on stdout");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  auto stub = v1::AdminService::NewStub(Connect(target));
  grpc::ClientContext context;
  if (resume) {
    v1::ResumeResponse response;
    const auto status = stub->Resume(&context, {}, &response);
    return status.ok() ? 0 : Fail("drain", status);
  }
  v1::DrainRequest request;
  request.set_shutdown(shutdown);
  if (grace != absl::InfiniteDuration()) {
    request.mutable_grace()->set_seconds(absl::ToInt64Seconds(grace));
    request.mutable_grace()->set_nanos(
        static_cast<int>(absl::ToInt64Nanoseconds(grace % absl::Seconds(1))));
  }
  auto reader = stub->Drain(&context, request);
  v1::DrainResponse message;
  while (reader->Read(&message)) {
    if (jsonl) {
      std::cout << ToJson(message, false) << std::endl;
    } else {
      std::cerr << message.running_requests() << " running, " << message.queued_requests()
                << " waiting\n";
    }
  }
  const auto status = reader->Finish();
  return status.ok() ? 0 : Fail("drain", status);
}

}  // namespace longspan
