#include "engine/sequence.h"

#include <algorithm>

#include "kernels/check.h"

namespace longspan {
namespace {

bool HasPenalties(const SamplingParams& p) {
  return p.presence_penalty != 0 || p.frequency_penalty != 0 || p.repetition_penalty != 1;
}

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

}  // namespace

Sequence::Sequence(const Request& request, int index, uint64_t seed, const Tokenizer& tokenizer,
                   int vocab, const std::vector<int>& eos)
    : request_(request),
      index_(index),
      seed_(seed),
      eos_(eos.begin(), eos.end()),
      tokens_(request.prompt),
      stream_(tokenizer, request.output.skip_special_tokens),
      matcher_(request.stopping.stop, request.stopping.include_stop_in_output) {
  tokens_.reserve(request.prompt.size() + request.stopping.max_tokens);
  if (HasPenalties(request.sampling)) {
    history_ = std::make_unique<TokenHistory>(vocab);
    for (int32_t token : request.prompt) history_->AddPrompt(token);
  }
  if (request.stopping.min_tokens > 0) {
    banned_early_ = request.stopping.stop_token_ids;
    if (!request.stopping.ignore_eos) {
      banned_early_.insert(banned_early_.end(), eos_.begin(), eos_.end());
    }
  }
}

Event Sequence::Next(Sampler& sampler, absl::Span<const float> logits) {
  CHECK(!finished());
  const bool early = output_tokens() < request_.stopping.min_tokens;
  SampleInput input;
  input.logits = logits;
  input.params = &request_.sampling;
  input.seed = seed_;
  input.choice = index_;
  input.position = output_tokens();
  input.history = history_.get();
  if (early) input.banned = banned_early_;
  input.top_logprobs = request_.output.logprobs.value_or(-1);
  Sampled sampled = sampler.Sample(input);

  Event event;
  event.index = index_;
  event.tokens = {sampled.token};
  if (request_.output.logprobs.has_value()) event.logprobs = {std::move(sampled.logprob)};
  tokens_.push_back(sampled.token);
  if (history_ != nullptr) history_->AddOutput(sampled.token);

  if (auto stop = StopsAt(sampled.token, event); stop.has_value()) {
    finish_ = *stop;
    if (request_.stopping.include_stop_in_output) AppendText(sampled.token, event);
  } else {
    AppendText(sampled.token, event);
    if (!finished() && output_tokens() >= request_.stopping.max_tokens) {
      finish_ = FinishReason::kLength;
    }
  }
  if (finished() && !event.stop_text.has_value()) {
    // Bytes of an unfinished character, then a stop string's unfinished beginning, are plain text
    // now.
    StopMatcher::Found rest = matcher_.Append(stream_.Flush());
    event.text += rest.text;
    if (!rest.stop.has_value()) event.text += matcher_.Flush();
  }
  event.finish = finish_;
  return event;
}

std::optional<FinishReason> Sequence::StopsAt(int32_t token, Event& event) {
  const bool eos = !request_.stopping.ignore_eos && Contains(eos_, token);
  if (!eos && !Contains(request_.stopping.stop_token_ids, token)) return std::nullopt;
  event.stop_token = token;
  event.stop_is_eos = eos;
  return FinishReason::kStop;
}

void Sequence::AppendText(int32_t token, Event& event) {
  const std::string text = stream_.Append(token);
  if (output_tokens() < request_.stopping.min_tokens) {
    event.text += text;  // no stop string counts yet
    return;
  }
  StopMatcher::Found found = matcher_.Append(text);
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
  event.text = matcher_.Append(stream_.Flush()).text + matcher_.Flush();
  return event;
}

}  // namespace longspan
