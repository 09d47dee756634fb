#pragma once
// A client of an engine in the same process: collects a request's events and checks their order.
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "engine/engine.h"

namespace longspan::testing {

struct Outcome {
  absl::Status status;
  struct Choice {
    std::vector<int32_t> tokens;
    std::string text;
    std::vector<TokenLogprob> logprobs;
    FinishReason finish = FinishReason::kNone;
    std::optional<std::string> stop_text;
    std::optional<int32_t> stop_token;
    bool stop_is_eos = false;
  };
  std::vector<Choice> choices;
  std::vector<TokenLogprob> prompt_logprobs;
  int prompts = 0;  // kPrompt events
  Event finished;
};

// Dies if events come in a wrong order: a prompt event after a delta, a delta after its choice's
// last, anything after kFinished.
class Client {
 public:
  Client(Engine& engine, int choices);

  // Called with each event before it is collected.
  absl::AnyInvocable<void(const Event&)> on_event = nullptr;

  absl::Status Submit(Request request);
  Outcome Wait();
  bool done() const;

 private:
  struct State;
  Engine& engine_;
  std::shared_ptr<State> state_;
};

// Submits and waits; a refused request has its refusal as the status.
Outcome Complete(Engine& engine, Request request);
// Submits all, which must be taken, then waits for all.
std::vector<Outcome> CompleteTogether(Engine& engine, const std::vector<Request>& requests);
bool SameTokens(const Outcome& a, const Outcome& b);
bool SameLogprobs(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b);

}  // namespace longspan::testing
