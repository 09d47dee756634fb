#include "engine/sequence.h"

#include <algorithm>

#include "kernels/check.h"

namespace longspan {
namespace {

template <class Id>
bool Contains(const std::vector<Id>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

Sequence::Sequence(const Request& request, int index, uint64_t seed, const Tokenizer& tokenizer,
                   int vocab, const std::vector<int>& eos)
    : request_(request),
      index_(index),
      seed_(seed),
      vocab_(vocab),
      eos_(eos.begin(), eos.end()),
      stream_(tokenizer, request.output.skip_special_tokens),
      matcher_(request.stopping.stop, request.stopping.include_stop_in_output) {
  tokens_.reserve(request.prompt.size() + request.stopping.max_tokens);
  tokens_.assign(request.prompt.begin(), request.prompt.end());
  if (request.stopping.min_tokens > 0) {
    const auto& ids = request.stopping.stop_token_ids;
    banned_early_.assign(ids.begin(), ids.end());
    if (!request.stopping.ignore_eos) {
      banned_early_.insert(banned_early_.end(), eos_.begin(), eos_.end());
    }
  }
}

// Made at the first token: requests that wait in the queue should stay small.
const TokenHistory* Sequence::History() {
  if (history_ == nullptr && HasPenalties(request_.sampling)) {
    history_ = std::make_unique<TokenHistory>(vocab_);
    for (int32_t token : request_.prompt) history_->AddPrompt(token);
  }
  return history_.get();
}

void Sequence::AddDraw(int row, int choice, DrawList* list) {
  CHECK(!finished());
  DrawInput input;
  input.row = row;
  input.params = &request_.sampling;
  input.seed = seed_;
  input.choice = choice;
  input.position = output_tokens();
  input.history = History();
  if (output_tokens() < request_.stopping.min_tokens) input.banned = banned_early_;
  list->Add(input);
}

Event Sequence::Next(Drawn drawn) {
  CHECK(!finished());
  CHECK_LT(drawn.token, vocab_) << "every token is banned";
  const StoppingParams& stopping = request_.stopping;
  Event event;
  event.index = index_;
  event.token = drawn.token;
  if (drawn.logprob.has_value()) event.logprobs = {*std::move(drawn.logprob)};
  tokens_.push_back(drawn.token);
  if (history_ != nullptr) history_->AddOutput(drawn.token);

  const bool may_stop = output_tokens() >= stopping.min_tokens;
  if (StopsAt(drawn.token, event)) {
    finish_ = FinishReason::kStop;
    if (stopping.include_stop_in_output) AppendText(stream_.Append(drawn.token), false, event);
  } else {
    AppendText(stream_.Append(drawn.token), may_stop, event);
    if (!finished() && output_tokens() >= stopping.max_tokens) finish_ = FinishReason::kLength;
  }
  if (finished() && !event.stop_text.has_value()) {
    // Bytes of an unfinished character, then a stop string's unfinished beginning, are plain text
    // now.
    AppendText(stream_.Flush(), may_stop && finish_ == FinishReason::kLength, event);
    event.text += matcher_.Flush();
  }
  event.finish = finish_;
  return event;
}

bool Sequence::StopsAt(int32_t token, Event& event) const {
  const bool eos = !request_.stopping.ignore_eos && Contains(eos_, token);
  if (!eos && !Contains(request_.stopping.stop_token_ids, token)) return false;
  event.stop_token = token;
  event.stop_is_eos = eos;
  return true;
}

void Sequence::AppendText(absl::string_view text, bool may_stop, Event& event) {
  StopMatcher::Found found = matcher_.Append(text, may_stop);
  event.text += found.text;
  if (found.stop.has_value()) {
    event.stop_text = std::move(found.stop);
    finish_ = FinishReason::kStop;
  }
}

Event Sequence::Cancelled() {
  finish_ = FinishReason::kCancelled;
  Event event;
  event.index = index_;
  event.finish = finish_;
  AppendText(stream_.Flush(), false, event);
  event.text += matcher_.Flush();
  return event;
}

}  // namespace longspan
