#pragma once
// Chat messages to a prompt. Built-in templates only: Gemma's turns, for models of that family
// whose vocabulary has the turn tokens (https://ai.google.dev/gemma/docs/core/prompt-structure).
// Any other model has no chat form here, rather than a guessed one. Immutable and safe from any
// thread; the tokenizer outlives it.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "models/spec.h"
#include "models/tokenizer.h"

namespace longspan {

struct ChatTurn {
  std::string role;  // "system", "user", "assistant" (or "model")
  std::string content;
};

class ChatTemplate {
 public:
  // nullptr when the model has no chat form (then Chat is FAILED_PRECONDITION).
  static std::unique_ptr<ChatTemplate> For(const ModelSpec& spec, const Tokenizer& tokenizer);

  const std::string& name() const { return name_; }
  // The prompt text, without the beginning-of-sequence token. InvalidArgument names the turn and
  // why: unknown role, roles that do not alternate, empty list, control tokens inside content (so
  // that no message can forge a turn). A first system message is put before the first user message,
  // as Gemma was trained; content is stripped of white space around it (a message to be continued,
  // only before it).
  absl::StatusOr<std::string> Render(absl::Span<const ChatTurn> turns, bool add_generation_prompt,
                                     bool continue_final_message) const;

 private:
  ChatTemplate(std::string name, const Tokenizer* tokenizer)
      : name_(std::move(name)), tokenizer_(tokenizer) {}
  absl::Status Validate(absl::Span<const ChatTurn> turns, bool continue_final_message) const;

  std::string name_;
  const Tokenizer* tokenizer_;
};

}  // namespace longspan
