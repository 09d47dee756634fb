#include "server/completion.h"

#include "absl/time/clock.h"
#include "server/span_proto.h"

namespace longspan {
namespace {

std::string EchoOf(const Frontend& frontend, const v1::OutputOptions& options,
                   const Request& converted) {
  if (!options.echo() || (options.has_return_text() && !options.return_text())) return "";
  return frontend.conversion.tokenizer->Decode(converted.prompt,
                                               converted.output.skip_special_tokens);
}

void AddPromptLogprobs(const Event& event, const std::vector<int32_t>& prompt,
                       const Tokenizer& tokenizer,
                       google::protobuf::RepeatedPtrField<v1::TokenLogprob>* to) {
  for (size_t i = 0; i < event.logprobs.size(); ++i) {
    if (i == 0) {  // nothing predicts the first token
      v1::TokenLogprob* first = to->Add();
      first->set_token_id(prompt[0]);
      first->set_token(tokenizer.Piece(prompt[0]));
      continue;
    }
    ToProto(event.logprobs[i], tokenizer, to->Add());
  }
}

}  // namespace

CompletionBuilder::CompletionBuilder(const Frontend& frontend, const v1::CompleteRequest& request,
                                     const Request& converted)
    : frontend_(frontend),
      options_(request.output()),
      echo_(EchoOf(frontend, request.output(), converted)),
      prompt_(converted.prompt) {}

void CompletionBuilder::Add(const Event& event, v1::CompleteResponse* response) {
  const Tokenizer& tokenizer = *frontend_.conversion.tokenizer;
  switch (event.kind) {
    case Event::Kind::kPrompt:
      if (options_.return_token_ids()) {
        response->mutable_prompt_token_ids()->Add(prompt_.begin(), prompt_.end());
      }
      AddPromptLogprobs(event, prompt_, tokenizer, response->mutable_prompt_logprobs());
      break;
    case Event::Kind::kDelta: {
      while (response->choices_size() <= event.index) {
        v1::Choice* choice = response->add_choices();
        choice->set_index(response->choices_size() - 1);
        choice->set_text(echo_);
      }
      AppendDelta(event, options_, tokenizer, response->mutable_choices(event.index));
      break;
    }
    case Event::Kind::kFinished:
      *response->mutable_usage() = UsageOf(event);
      ToProto(event.timings, response->mutable_timings());
      if (event.spans.has_value()) {
        *response->mutable_attention_spans() =
            ToProto(*event.spans, *frontend_.conversion.spec, {});
      }
      break;
  }
}

StreamBuilder::StreamBuilder(const Frontend& frontend, const v1::CompleteRequest& request,
                             const Request& converted, bool include_usage)
    : frontend_(frontend),
      options_(request.output()),
      id_(converted.id),
      echo_(EchoOf(frontend, request.output(), converted)),
      prompt_(converted.prompt),
      echoed_(converted.n, echo_.empty()),
      include_usage_(include_usage) {}

void StreamBuilder::Add(const Event& event, std::deque<v1::StreamCompleteResponse>* outbox) {
  const Tokenizer& tokenizer = *frontend_.conversion.tokenizer;
  auto next = [&]() -> v1::StreamCompleteResponse& {
    v1::StreamCompleteResponse& message = outbox->emplace_back();
    message.set_request_id(id_);
    return message;
  };
  switch (event.kind) {
    case Event::Kind::kPrompt: {
      v1::PromptInfo* info = next().mutable_prompt();
      info->set_prompt_tokens(event.prompt_tokens);
      if (options_.return_token_ids()) {
        info->mutable_token_ids()->Add(prompt_.begin(), prompt_.end());
      }
      AddPromptLogprobs(event, prompt_, tokenizer, info->mutable_logprobs());
      break;
    }
    case Event::Kind::kDelta: {
      v1::Choice* choice = nullptr;
      for (auto& waiting : *outbox) {
        if (waiting.has_delta() && waiting.delta().index() == static_cast<uint32_t>(event.index)) {
          choice = waiting.mutable_delta();
        }
      }
      if (choice == nullptr) choice = next().mutable_delta();
      if (!echoed_[event.index]) {
        choice->set_text(echo_);
        echoed_[event.index] = true;
      }
      AppendDelta(event, options_, tokenizer, choice);
      break;
    }
    case Event::Kind::kFinished:
      if (!event.status.ok()) break;
      if (event.spans.has_value()) {
        *next().mutable_attention_spans() = ToProto(*event.spans, *frontend_.conversion.spec, {});
      }
      if (include_usage_) {
        v1::StreamCompleteResponse& message = next();
        *message.mutable_usage() = UsageOf(event);
        ToProto(event.timings, message.mutable_timings());
      }
      break;
  }
}

}  // namespace longspan
