// longspan complete, longspan chat.
#include <unistd.h>

#include <csignal>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "absl/strings/str_format.h"
#include "longspan/v1/inference.grpc.pb.h"
#include "server/cli.h"
#include "server/cli_client.h"

namespace longspan {
namespace {

using cli::Connect;
using cli::Fail;
using cli::ToJson;

struct Knobs {
  cli::Target target;
  std::string model;
  int max_tokens = 128;
  double temperature = 0.7, top_p = 1, min_p = 0;
  int top_k = 0, n = 1, logprobs = -1;
  int64_t seed = -1;
  std::vector<std::string> stop;
  bool ignore_eos = false, echo = false, spans = false, stats = false;

  void Declare(Flags& flags) {
    cli::TargetFlags(flags, &target);
    cli::ModelFlag(flags, &model);
    flags.Int("max-tokens", &max_tokens, "tokens to generate at most", 1);
    flags.Double("temperature", &temperature, "0 is greedy; higher is more varied");
    flags.Double("top-p", &top_p, "keep the most likely tokens that add up to this");
    flags.Int("top-k", &top_k, "keep this many tokens; 0 keeps all");
    flags.Double("min-p", &min_p, "keep tokens at least this likely, relative to the likeliest");
    flags.Int64("seed", &seed, "same seed, same text; -1 draws one", -1);
    flags.Strings("stop", &stop, "TEXT", "end before this text; may be repeated");
    flags.Bool("ignore-eos", &ignore_eos, "go on after the end of the text");
    flags.Bool("stats", &stats, "print times and tokens to stderr at the end");
  }
  void Fill(v1::CompleteRequest* request) const {
    request->set_model(model);
    auto* sampling = request->mutable_sampling();
    sampling->set_temperature(static_cast<float>(temperature));
    sampling->set_top_p(static_cast<float>(top_p));
    sampling->set_min_p(static_cast<float>(min_p));
    sampling->set_top_k(top_k);
    sampling->set_n(n);
    if (seed >= 0) sampling->set_seed(seed);
    auto* stopping = request->mutable_stopping();
    stopping->set_max_tokens(max_tokens);
    stopping->set_ignore_eos(ignore_eos);
    for (const std::string& s : stop) stopping->add_stop(s);
    auto* output = request->mutable_output();
    output->set_echo(echo);
    if (logprobs >= 0) output->set_logprobs(logprobs);
    output->set_return_attention_spans(spans);
  }
};

void PrintStats(const v1::Usage& usage, const v1::Timings& t) {
  std::cerr << absl::StreamFormat(
      "%d prompt tokens, %d generated; first token after %.0f ms, then %.1f tokens/s\n",
      usage.prompt_tokens(), usage.completion_tokens(), t.time_to_first_token_seconds() * 1e3,
      t.decode_seconds() > 0 ? (usage.completion_tokens() - 1) / t.decode_seconds() : 0.0);
}

// The prompt from --prompt, --prompt-file or standard input, in this order; nullopt if there is
// none.
std::optional<std::string> ReadPrompt(const Flags& flags, const std::string& prompt,
                                      const std::string& file) {
  if (flags.IsSet("prompt")) return prompt;
  if (!file.empty()) {
    std::ifstream in(file, std::ios::binary);
    if (!in) {
      std::cerr << "longspan complete: cannot read " << file << "\n";
      return std::nullopt;
    }
    return std::string(std::istreambuf_iterator<char>(in), {});
  }
  if (isatty(STDIN_FILENO) == 1) {
    std::cerr << "longspan complete: give --prompt, --prompt-file or text on standard input\n";
    return std::nullopt;
  }
  return std::string(std::istreambuf_iterator<char>(std::cin), {});
}

int CompleteOnce(v1::InferenceService::Stub& stub, const v1::CompleteRequest& request, bool json) {
  grpc::ClientContext context;
  v1::CompleteResponse response;
  const grpc::Status status = stub.Complete(&context, request, &response);
  if (!status.ok()) return Fail("complete", status);
  if (json) {
    std::cout << ToJson(response, /*pretty=*/true) << "\n";
  } else {
    for (const v1::Choice& choice : response.choices()) {
      if (response.choices_size() > 1) std::cout << "--- " << choice.index() << "\n";
      std::cout << choice.text() << "\n";
    }
  }
  return 0;
}

int CompleteStream(v1::InferenceService::Stub& stub, const v1::CompleteRequest& request, bool jsonl,
                   bool stats) {
  grpc::ClientContext context;
  v1::StreamCompleteRequest stream_request;
  *stream_request.mutable_request() = request;
  stream_request.set_include_usage(true);
  auto reader = stub.StreamComplete(&context, stream_request);
  v1::StreamCompleteResponse message, last;
  bool open_line = false;
  while (reader->Read(&message)) {
    if (jsonl) {
      std::cout << ToJson(message, /*pretty=*/false) << std::endl;
    } else if (message.has_delta()) {
      std::cout << message.delta().text() << std::flush;
      open_line = true;
    }
    if (message.has_usage()) last = message;
  }
  if (open_line) std::cout << std::endl;
  if (stats && last.has_usage()) PrintStats(last.usage(), last.timings());
  const grpc::Status status = reader->Finish();
  return status.ok() ? 0 : Fail("complete", status);
}

}  // namespace

int RunComplete(int argc, char** argv) {
  Knobs knobs;
  std::string prompt, prompt_file;
  bool json = false, jsonl = false;
  Flags flags("complete", "[flags]", "Completes a prompt and streams the text to stdout.");
  flags.String("prompt", &prompt, "TEXT", "the text to go on from; else standard input");
  flags.String("prompt-file", &prompt_file, "FILE", "or a file that holds it");
  knobs.Declare(flags);
  flags.Int("n", &knobs.n, "choices; more than one is streamed only with --jsonl", 1, 64);
  flags.Int("logprobs", &knobs.logprobs,
            "also the likeliest tokens, 0 to 20 (with --json); -1 is none", -1, 20);
  flags.Bool("echo", &knobs.echo, "print the prompt too");
  flags.Bool("attention-spans", &knobs.spans, "also this request's spans (with --json)");
  flags.Bool("json", &json, "one JSON object at the end instead of text");
  flags.Bool("jsonl", &jsonl, "one JSON object per event instead of text");
  flags.Epilogue(
      "Examples:\n"
      "  longspan complete --prompt 'Once upon a time' --max-tokens 60 --temperature 0.7\n"
      "  longspan complete --prompt 'Once' --json --logprobs 3 | jq .choices[0].text\n"
      "  cat story.txt | longspan complete --stop '\n\n' --stats");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  const auto text = ReadPrompt(flags, prompt, prompt_file);
  if (!text.has_value()) return 2;
  v1::CompleteRequest request;
  request.set_text(*text);
  knobs.Fill(&request);
  auto stub = v1::InferenceService::NewStub(Connect(knobs.target));
  return json || (knobs.n > 1 && !jsonl) ? CompleteOnce(*stub, request, json)
                                         : CompleteStream(*stub, request, jsonl, knobs.stats);
}

int RunChat(int argc, char** argv) {
  Knobs knobs;
  knobs.max_tokens = 512;
  std::string quick, system;
  bool jsonl = false;
  Flags flags(
      "chat", "[flags]",
      "Talks to a model that has a chat form; type a line, read the answer, end with Ctrl-D.");
  knobs.Declare(flags);
  flags.String("system", &system, "TEXT", "instructions that come first");
  flags.String("quick", &quick, "TEXT", "ask this once and exit");
  flags.Bool("jsonl", &jsonl, "one JSON object per event instead of text");
  flags.Epilogue("Example:\n  longspan chat --quick 'Name three rivers.' --temperature 0");
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  auto stub = v1::InferenceService::NewStub(Connect(knobs.target));
  v1::StreamChatRequest request;
  request.set_include_usage(true);
  knobs.Fill(request.mutable_request()->mutable_base());
  auto add = [&](const char* role, const std::string& content) {
    auto* message = request.mutable_request()->add_messages();
    message->set_role(role);
    message->set_content(content);
  };
  if (!system.empty()) add("system", system);
  const bool interactive = quick.empty();
  while (true) {
    std::string line = quick;
    if (interactive) {
      if (isatty(STDIN_FILENO) == 1) std::cerr << "> ";
      if (!std::getline(std::cin, line)) return 0;
      if (line.empty()) continue;
    }
    add("user", line);
    grpc::ClientContext context;
    auto reader = stub->StreamChat(&context, request);
    v1::StreamChatResponse message;
    v1::StreamCompleteResponse last;
    std::string answer;
    while (reader->Read(&message)) {
      if (jsonl) std::cout << ToJson(message, /*pretty=*/false) << std::endl;
      if (message.base().has_delta()) {
        answer += message.base().delta().text();
        if (!jsonl) std::cout << message.base().delta().text() << std::flush;
      }
      if (message.base().has_usage()) last = message.base();
    }
    if (!answer.empty() && !jsonl) std::cout << std::endl;
    if (knobs.stats && last.has_usage()) PrintStats(last.usage(), last.timings());
    if (const grpc::Status status = reader->Finish(); !status.ok()) return Fail("chat", status);
    if (!interactive) return 0;
    add("assistant", answer);
  }
}

}  // namespace longspan
