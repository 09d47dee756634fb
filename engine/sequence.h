#pragma once
// One choice of a request while it is in the engine: its tokens, its text, when it ends. Engine
// thread.
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/kv_cache.h"
#include "engine/request.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "engine/stop_matcher.h"
#include "models/tokenizer.h"

namespace longspan {

class Sequence {
 public:
  // `request` outlives the sequence. eos: the model's end-of-sequence ids.
  Sequence(const Request& request, int index, uint64_t seed, const Tokenizer& tokenizer, int vocab,
           const std::vector<int>& eos);

  int index() const { return index_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }  // prompt ++ output
  int output_tokens() const { return static_cast<int>(tokens_.size() - request_.prompt.size()); }
  FinishReason finish() const { return finish_; }
  bool finished() const { return finish_ != FinishReason::kNone; }

  // Adds what draws the next token from row `row` of the logits; `choice` is index(), or that of a
  // choice which forks from this one before its first token.
  void AddDraw(int row, int choice, DrawList* list);
  // Takes the token that was drawn and returns the delta event that it makes. Sets finished().
  Event Next(Drawn drawn);
  // The last delta of a sequence that ends for an outside reason.
  Event Cancelled();

  Ticket ticket = 0;
  SequenceId cache = -1;  // -1: none (queued or preempted)

 private:
  const TokenHistory* History();
  bool StopsAt(int32_t token, Event& event) const;  // an id that ends the text; fills the event
  void AppendText(absl::string_view text, bool may_stop, Event& event);

  const Request& request_;
  int index_;
  uint64_t seed_;
  int vocab_;
  std::vector<int32_t> eos_;
  std::vector<int32_t> tokens_;
  std::unique_ptr<TokenHistory> history_;  // only when a penalty is set
  std::vector<int32_t> banned_early_;      // ids that end the text, banned before min_tokens
  TokenStream stream_;
  StopMatcher matcher_;
  FinishReason finish_ = FinishReason::kNone;
};

}  // namespace longspan
