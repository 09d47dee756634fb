#pragma once
// Chat messages to a prompt. Built-in templates only (Gemma's turns); a checkpoint whose template is not
// one of them, or has none, is refused by name instead of guessed.
#include <memory>
#include <string>
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
  // The prompt text, without the beginning-of-sequence token. InvalidArgument names the turn and why:
  // unknown role, roles that do not alternate, empty list, control tokens inside content.
  absl::StatusOr<std::string> Render(absl::Span<const ChatTurn> turns, bool add_generation_prompt,
                                     bool continue_final_message) const;

 private:
  explicit ChatTemplate(std::string name) : name_(std::move(name)) {}
  std::string name_;
};

}  // namespace longspan
