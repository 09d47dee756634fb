#include "tests/support/engine_client.h"

#include <utility>

#include "kernels/check.h"

namespace longspan::testing {

struct Client::State {
  absl::Mutex mu;
  Outcome outcome ABSL_GUARDED_BY(mu);
  bool done ABSL_GUARDED_BY(mu) = false;
  absl::AnyInvocable<void(const Event&)> on_event;  // engine thread

  void Take(Event event) {
    if (on_event) on_event(event);
    absl::MutexLock lock(&mu);
    CHECK(!done) << "an event after kFinished";
    switch (event.kind) {
      case Event::Kind::kPrompt:
        for (const Outcome::Choice& choice : outcome.choices) CHECK(choice.tokens.empty());
        ++outcome.prompts;
        outcome.prompt_logprobs = std::move(event.logprobs);
        return;
      case Event::Kind::kDelta: {
        CHECK_LT(event.index, static_cast<int>(outcome.choices.size()));
        Outcome::Choice& choice = outcome.choices[event.index];
        CHECK(choice.finish == FinishReason::kNone) << "a delta after the last";
        if (event.token.has_value()) choice.tokens.push_back(*event.token);
        choice.text += event.text;
        for (TokenLogprob& one : event.logprobs) choice.logprobs.push_back(std::move(one));
        choice.finish = event.finish;
        choice.stop_text = event.stop_text;
        choice.stop_token = event.stop_token;
        choice.stop_is_eos = event.stop_is_eos;
        return;
      }
      case Event::Kind::kFinished:
        for (const Outcome::Choice& choice : outcome.choices) {
          CHECK(choice.finish != FinishReason::kNone) << "a choice had no last delta";
        }
        outcome.status = event.status;
        outcome.finished = std::move(event);
        done = true;
    }
  }
};

Client::Client(Engine& engine, int choices) : engine_(engine), state_(std::make_shared<State>()) {
  absl::MutexLock lock(&state_->mu);
  state_->outcome.choices.resize(choices);
}

absl::Status Client::Submit(Request request) {
  state_->on_event = std::move(on_event);
  return engine_.Submit(std::move(request),
                        [state = state_](Event event) { state->Take(std::move(event)); });
}

Outcome Client::Wait() {
  absl::MutexLock lock(&state_->mu);
  CHECK(state_->mu.AwaitWithTimeout(absl::Condition(&state_->done), absl::Seconds(120)))
      << "no kFinished in two minutes";
  return state_->outcome;
}

bool Client::done() const {
  absl::MutexLock lock(&state_->mu);
  return state_->done;
}

Outcome Complete(Engine& engine, Request request) {
  Client client(engine, request.n);
  if (absl::Status submitted = client.Submit(std::move(request)); !submitted.ok()) {
    Outcome outcome;
    outcome.status = std::move(submitted);
    return outcome;
  }
  return client.Wait();
}

std::vector<Outcome> CompleteTogether(Engine& engine, const std::vector<Request>& requests) {
  std::vector<std::unique_ptr<Client>> clients;
  for (const Request& request : requests) {
    clients.push_back(std::make_unique<Client>(engine, request.n));
    const absl::Status submitted = clients.back()->Submit(request);
    CHECK(submitted.ok()) << submitted;
  }
  std::vector<Outcome> outcomes;
  for (auto& client : clients) outcomes.push_back(client->Wait());
  return outcomes;
}

bool SameLogprobs(const std::vector<TokenLogprob>& a, const std::vector<TokenLogprob>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].token != b[i].token || a[i].logprob != b[i].logprob || a[i].rank != b[i].rank ||
        !SameLogprobs(a[i].top, b[i].top)) {
      return false;
    }
  }
  return true;
}

bool SameTokens(const Outcome& a, const Outcome& b) {
  if (a.choices.size() != b.choices.size()) return false;
  for (size_t i = 0; i < a.choices.size(); ++i) {
    const Outcome::Choice &x = a.choices[i], &y = b.choices[i];
    if (x.tokens != y.tokens || x.text != y.text || x.finish != y.finish ||
        !SameLogprobs(x.logprobs, y.logprobs)) {
      return false;
    }
  }
  return true;
}

}  // namespace longspan::testing
