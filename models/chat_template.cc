#include "models/chat_template.h"

#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

constexpr absl::string_view kStart = "<start_of_turn>";
constexpr absl::string_view kEnd = "<end_of_turn>";

// The template's name of a role, empty when it has none.
absl::string_view GemmaRole(absl::string_view role) {
  if (role == "user") return "user";
  if (role == "assistant" || role == "model") return "model";
  return "";
}

std::string TurnName(size_t i, const ChatTurn& turn) {
  return absl::StrCat("messages[", i, "] (role \"", turn.role.substr(0, 40), "\")");
}

}  // namespace

std::unique_ptr<ChatTemplate> ChatTemplate::For(const ModelSpec& spec, const Tokenizer& tokenizer) {
  const bool family = absl::StartsWith(spec.family, "gemma");
  const bool turns = tokenizer.FindToken(kStart) >= 0 && tokenizer.FindToken(kEnd) >= 0;
  const std::string& shipped = tokenizer.chat_template();
  const bool agrees = shipped.empty() || absl::StrContains(shipped, kStart);
  if (!family || !turns || !agrees) return nullptr;
  return std::unique_ptr<ChatTemplate>(new ChatTemplate("gemma", &tokenizer));
}

absl::Status ChatTemplate::Validate(absl::Span<const ChatTurn> turns,
                                    bool continue_final_message) const {
  if (turns.empty()) return absl::InvalidArgumentError("messages is empty, 1 is the minimum");
  for (size_t i = 0; i < turns.size(); ++i) {
    const ChatTurn& turn = turns[i];
    if (const auto special = tokenizer_->FindSpecialText(turn.content)) {
      return absl::InvalidArgumentError(
          absl::StrCat(TurnName(i, turn), ": content holds the control token ",
                       tokenizer_->Piece(special->second), " at byte ", special->first,
                       "; a message cannot hold control tokens"));
    }
    if (turn.role == "system" && i == 0) continue;
    const absl::string_view role = GemmaRole(turn.role);
    if (role.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(TurnName(i, turn), turn.role == "system"
                                              ? ": a system message can only come first"
                                              : ": the role must be system, user or assistant"));
    }
    const size_t first = turns[0].role == "system" ? 1 : 0;
    const absl::string_view wanted = (i - first) % 2 == 0 ? "user" : "model";
    if (role != wanted) {
      return absl::InvalidArgumentError(
          absl::StrCat(TurnName(i, turn), ": roles must alternate and begin with user; \"",
                       wanted == "model" ? "assistant" : "user", "\" is next"));
    }
  }
  if (turns.back().role == "system") {
    return absl::InvalidArgumentError(
        "messages has a system message only, a user message is needed");
  }
  if (continue_final_message && GemmaRole(turns.back().role) != "model") {
    return absl::InvalidArgumentError(
        absl::StrCat("continue_final_message needs the last message to be the assistant's, ",
                     TurnName(turns.size() - 1, turns.back()), " is last"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> ChatTemplate::Render(absl::Span<const ChatTurn> turns,
                                                 bool add_generation_prompt,
                                                 bool continue_final_message) const {
  if (add_generation_prompt && continue_final_message) {
    return absl::InvalidArgumentError(
        "add_generation_prompt and continue_final_message exclude each other");
  }
  if (absl::Status s = Validate(turns, continue_final_message); !s.ok()) return s;
  std::string system, text;
  for (const ChatTurn& turn : turns) {
    if (turn.role == "system") {
      system = absl::StrCat(turn.content, "\n\n");
      continue;
    }
    const bool open = continue_final_message && &turn == &turns.back();
    absl::StrAppend(&text, kStart, GemmaRole(turn.role), "\n", std::exchange(system, ""),
                    open ? absl::StripLeadingAsciiWhitespace(turn.content)
                         : absl::StripAsciiWhitespace(turn.content));
    if (!open) absl::StrAppend(&text, kEnd, "\n");
  }
  if (add_generation_prompt) absl::StrAppend(&text, kStart, "model\n");
  return text;
}

}  // namespace longspan
