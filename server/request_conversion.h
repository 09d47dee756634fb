#pragma once
// API messages to engine requests and back: pure functions, so that they can be tested and fuzzed
// without a server.
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/request.h"
#include "longspan/v1/inference.pb.h"
#include "models/chat_template.h"
#include "models/spec.h"
#include "models/tokenizer.h"

namespace longspan {

// What a request is checked against.
struct ConversionContext {
  const Tokenizer* tokenizer = nullptr;
  const ChatTemplate* chat_template = nullptr;  // may be nullptr
  const ModelSpec* spec = nullptr;
  int max_context = 0;
  std::vector<std::string> model_names;  // the first is the served name
  size_t max_prompt_bytes = 0;           // checked before tokenizing
};

// NotFound unless `model` is empty or one of the names.
absl::Status CheckModel(const std::string& model, const ConversionContext& context);

// Fills id (made up if empty), prompt, knobs; the rest of the checks is Engine::Submit's.
// max_tokens unset becomes the rest of the context.
absl::StatusOr<Request> ToRequest(const v1::CompleteRequest& request,
                                  const ConversionContext& context);
// The same with the prompt rendered from messages. FailedPrecondition without a chat template.
absl::StatusOr<Request> ToRequest(const v1::ChatRequest& request, const ConversionContext& context);
absl::StatusOr<std::vector<int32_t>> RenderChat(const v1::ChatRequest& request,
                                                const ConversionContext& context);

void ToProto(const TokenLogprob& from, const Tokenizer& tokenizer, v1::TokenLogprob* to);
// What of `event` (a delta) the options ask for, appended to `choice`.
void AppendDelta(const Event& event, const v1::OutputOptions& options, const Tokenizer& tokenizer,
                 v1::Choice* choice);
void ToProto(const Timings& from, v1::Timings* to);
v1::Usage UsageOf(const Event& finished);

std::string NewId(absl::string_view prefix);  // "cmpl-" and 16 random hex digits

}  // namespace longspan
