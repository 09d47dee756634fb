#include "server/request_conversion.h"

#include <algorithm>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/validate.h"

namespace longspan {
namespace {

template <class... Parts>
absl::Status Bad(absl::string_view field, const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", parts...));
}

absl::Status ReadSampling(const v1::SamplingOptions& from, Request& to) {
  SamplingParams& s = to.sampling;
  if (from.has_temperature()) s.temperature = from.temperature();
  if (from.has_top_p()) s.top_p = from.top_p();
  if (from.has_top_k()) s.top_k = from.top_k();
  if (from.has_min_p()) s.min_p = from.min_p();
  if (from.has_seed()) s.seed = from.seed();
  if (from.has_n()) to.n = from.n();
  if (from.has_presence_penalty()) s.presence_penalty = from.presence_penalty();
  if (from.has_frequency_penalty()) s.frequency_penalty = from.frequency_penalty();
  if (from.has_repetition_penalty()) s.repetition_penalty = from.repetition_penalty();
  if (from.logit_bias_size() > RequestLimits::kMaxBiases) {
    return Bad("sampling.logit_bias", "has ", from.logit_bias_size(), " entries, the limit is ",
               RequestLimits::kMaxBiases);
  }
  for (const auto& [token, bias] : from.logit_bias()) {
    s.logit_bias.emplace_back(token, bias);
  }
  std::sort(s.logit_bias.begin(), s.logit_bias.end());
  return absl::OkStatus();
}

void ReadStopping(const v1::StoppingOptions& from, int rest_of_context, StoppingParams& to) {
  to.max_tokens = from.has_max_tokens() ? from.max_tokens() : rest_of_context;
  to.min_tokens = from.min_tokens();
  to.stop.assign(from.stop().begin(), from.stop().end());
  for (uint32_t id : from.stop_token_ids()) to.stop_token_ids.push_back(id);
  to.ignore_eos = from.ignore_eos();
  to.include_stop_in_output = from.include_stop_in_output();
}

void ReadOutput(const v1::OutputOptions& from, OutputParams& to) {
  if (from.has_logprobs()) to.logprobs = from.logprobs();
  if (from.has_prompt_logprobs()) to.prompt_logprobs = from.prompt_logprobs();
  if (from.has_skip_special_tokens()) to.skip_special_tokens = from.skip_special_tokens();
  to.attention_spans = from.return_attention_spans();
}

absl::Status CheckBytes(size_t bytes, const ConversionContext& context) {
  if (bytes <= context.max_prompt_bytes) return absl::OkStatus();
  return WithReason(Bad("prompt", "has ", bytes, " bytes, the limit is ", context.max_prompt_bytes),
                    "CONTEXT_LENGTH_EXCEEDED");
}

// Everything but the prompt, whose tokens are given.
absl::StatusOr<Request> Assemble(const v1::CompleteRequest& from, std::vector<int32_t> prompt,
                                 const ConversionContext& context) {
  Request to;
  to.id = from.request_id().empty() ? NewId("cmpl-") : from.request_id();
  constexpr size_t kMaxIdBytes = 256;
  constexpr size_t kMaxSaltBytes = 256;
  if (to.id.size() > kMaxIdBytes) {
    return Bad("request_id", "has ", to.id.size(), " bytes, the limit is ", kMaxIdBytes);
  }
  // It is echoed as metadata, where gRPC takes nothing else.
  for (char c : to.id) {
    if (c < 0x21 || c > 0x7e) {
      return Bad("request_id", "has byte ", static_cast<int>(static_cast<unsigned char>(c)),
                 ", must be printable ASCII without spaces");
    }
  }
  if (from.cache_salt().size() > kMaxSaltBytes) {
    return Bad("cache_salt", "has ", from.cache_salt().size(), " bytes, the limit is ",
               kMaxSaltBytes);
  }
  to.prompt = std::move(prompt);
  if (from.has_truncate_prompt_tokens()) {
    const size_t keep = from.truncate_prompt_tokens();
    if (keep == 0) return Bad("truncate_prompt_tokens", "is 0, must be at least 1");
    if (keep < to.prompt.size()) to.prompt.erase(to.prompt.begin(), to.prompt.end() - keep);
  }
  if (absl::Status s = ReadSampling(from.sampling(), to); !s.ok()) return s;
  const int64_t rest = context.max_context - static_cast<int64_t>(to.prompt.size());
  ReadStopping(from.stopping(), static_cast<int>(std::max<int64_t>(rest, 1)), to.stopping);
  ReadOutput(from.output(), to.output);
  to.priority = from.priority();
  return to;
}

}  // namespace

absl::Status CheckModel(const std::string& model, const ConversionContext& context) {
  const auto& names = context.model_names;
  if (model.empty() || std::find(names.begin(), names.end(), model) != names.end()) {
    return absl::OkStatus();
  }
  return WithReason(absl::NotFoundError(absl::StrCat("model '", model, "' is not served here; '",
                                                     names.front(), "' is")),
                    "MODEL_NOT_FOUND");
}

absl::StatusOr<Request> ToRequest(const v1::CompleteRequest& request,
                                  const ConversionContext& context) {
  if (absl::Status s = CheckModel(request.model(), context); !s.ok()) return s;
  std::vector<int32_t> prompt;
  switch (request.prompt_case()) {
    case v1::CompleteRequest::kText:
      if (request.text().empty()) return Bad("prompt", "is empty");
      if (absl::Status s = CheckBytes(request.text().size(), context); !s.ok()) return s;
      prompt = context.tokenizer->Encode(request.text());
      break;
    case v1::CompleteRequest::kTokenIds:
      for (uint32_t id : request.token_ids().ids()) {
        if (id >= static_cast<uint32_t>(context.spec->vocab)) {
          return Bad("prompt", "token id ", id, " is not in the vocabulary of ",
                     context.spec->vocab);
        }
        prompt.push_back(static_cast<int32_t>(id));
      }
      break;
    case v1::CompleteRequest::PROMPT_NOT_SET:
      return Bad("prompt", "is not set");
  }
  return Assemble(request, std::move(prompt), context);
}

absl::StatusOr<std::vector<int32_t>> RenderChat(const v1::ChatRequest& request,
                                                const ConversionContext& context) {
  if (context.chat_template == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("model '", context.model_names.front(),
                     "' has no chat template; use Complete with a prompt instead"));
  }
  if (request.base().prompt_case() != v1::CompleteRequest::PROMPT_NOT_SET) {
    return Bad("base.prompt", "is set, but a chat's prompt is made from its messages");
  }
  if (request.template_kwargs().fields_size() > 0) {
    return Bad("template_kwargs", "has ", request.template_kwargs().fields_size(),
               " entries, but the template '", context.chat_template->name(), "' takes none");
  }
  if (request.continue_final_message() && request.add_generation_prompt()) {
    return Bad("add_generation_prompt", "is true, but continue_final_message leaves the turn open");
  }
  std::vector<ChatTurn> turns;
  size_t bytes = 0;
  for (const v1::ChatMessage& message : request.messages()) {
    const auto Unsupported = [&](absl::string_view field) {
      return Bad(absl::StrCat("messages[", turns.size(), "].", field), "is set, but the template '",
                 context.chat_template->name(), "' has no place for it");
    };
    if (!message.name().empty()) return Unsupported("name");
    if (!message.reasoning_content().empty()) return Unsupported("reasoning_content");
    turns.push_back({message.role(), message.content()});
    bytes += message.content().size() + message.role().size();
  }
  if (absl::Status s = CheckBytes(bytes, context); !s.ok()) return s;
  const bool generate = !request.has_add_generation_prompt() || request.add_generation_prompt();
  auto text = context.chat_template->Render(turns, generate && !request.continue_final_message(),
                                            request.continue_final_message());
  if (!text.ok()) return text.status();
  return context.tokenizer->Encode(*text);
}

absl::StatusOr<Request> ToRequest(const v1::ChatRequest& request,
                                  const ConversionContext& context) {
  if (absl::Status s = CheckModel(request.base().model(), context); !s.ok()) return s;
  auto prompt = RenderChat(request, context);
  if (!prompt.ok()) return prompt.status();
  return Assemble(request.base(), *std::move(prompt), context);
}

void ToProto(const TokenLogprob& from, const Tokenizer& tokenizer, v1::TokenLogprob* to) {
  to->set_token_id(from.token);
  to->set_token(tokenizer.Piece(from.token));
  to->set_logprob(from.logprob);
  to->set_rank(from.rank);
  for (const TokenLogprob& top : from.top) ToProto(top, tokenizer, to->add_top());
}

void AppendDelta(const Event& event, const v1::OutputOptions& options, const Tokenizer& tokenizer,
                 v1::Choice* choice) {
  choice->set_index(event.index);
  if (!options.has_return_text() || options.return_text())
    choice->mutable_text()->append(event.text);
  if (options.return_token_ids() && event.token.has_value()) choice->add_token_ids(*event.token);
  for (const TokenLogprob& logprob : event.logprobs) {
    ToProto(logprob, tokenizer, choice->add_logprobs());
  }
  switch (event.finish) {
    case FinishReason::kNone:
      return;
    case FinishReason::kStop:
      choice->set_finish_reason(v1::FINISH_REASON_STOP);
      break;
    case FinishReason::kLength:
      choice->set_finish_reason(v1::FINISH_REASON_LENGTH);
      break;
    case FinishReason::kCancelled:
      choice->set_finish_reason(v1::FINISH_REASON_CANCELLED);
      break;
  }
  if (event.stop_text.has_value()) {
    choice->set_stop_text(*event.stop_text);
  } else if (event.stop_token.has_value()) {
    event.stop_is_eos ? choice->set_eos_token_id(*event.stop_token)
                      : choice->set_stop_token_id(*event.stop_token);
  }
}

void ToProto(const Timings& from, v1::Timings* to) {
  to->set_queue_seconds(absl::ToDoubleSeconds(from.queued));
  to->set_prefill_seconds(absl::ToDoubleSeconds(from.prefill));
  to->set_time_to_first_token_seconds(absl::ToDoubleSeconds(from.time_to_first_token));
  to->set_decode_seconds(absl::ToDoubleSeconds(from.decode));
}

v1::Usage UsageOf(const Event& finished) {
  v1::Usage usage;
  usage.set_prompt_tokens(finished.prompt_tokens);
  usage.set_completion_tokens(finished.completion_tokens);
  usage.set_total_tokens(finished.prompt_tokens + finished.completion_tokens);
  usage.set_cached_prompt_tokens(finished.cached_prompt_tokens);
  return usage;
}

std::string NewId(absl::string_view prefix) {
  thread_local absl::BitGen random;
  return absl::StrFormat("%s%016x", prefix, absl::Uniform<uint64_t>(random));
}

}  // namespace longspan
