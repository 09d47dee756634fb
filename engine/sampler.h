#pragma once
// A request's knobs, seed and history → what the op Sample draws a token by; and log-probabilities.
// A draw is independent of batch neighbours and of earlier calls: the random number of output
// position i is a counter-based hash of (seed, choice index, i).
#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"
#include "engine/request.h"
#include "kernels/draw.h"

namespace longspan {

// Token counts that penalties need, kept by the sequence.
struct TokenHistory {
  explicit TokenHistory(int vocab) : in_prompt(vocab), output_count(vocab) { seen.reserve(vocab); }
  void AddPrompt(int32_t token);
  void AddOutput(int32_t token);

  std::vector<bool> in_prompt;
  std::vector<int32_t> output_count;
  std::vector<int32_t> seen;  // each token of prompt and output once
};

struct DrawInput {
  int row = 0;  // of the logits
  const SamplingParams* params = nullptr;
  uint64_t seed = 0;
  int choice = 0;
  int64_t position = 0;                   // of the output token, from 0
  const TokenHistory* history = nullptr;  // nullptr: no penalties
  absl::Span<const int32_t> banned;       // ids that may not be chosen (eos before min_tokens)
};

// Draws of one step and the edits that they name.
struct DrawList {
  std::vector<Draw> draws;
  std::vector<LogitEdit> edits;

  void Add(const DrawInput& input);
  void Clear() {
    draws.clear();
    edits.clear();
  }
};

// A token, and what its logits say of it if that is asked for.
struct Drawn {
  int32_t token = 0;
  std::optional<TokenLogprob> logprob;
};

bool HasPenalties(const SamplingParams& params);

// Uniform in [0, 1), a pure function of its arguments.
double UniformAt(uint64_t seed, int choice, int64_t position);

// log-softmax value, rank and the `top` most likely of one row of the raw model distribution
// (before knobs, as vLLM), most likely first. Equal logits rank by id, smaller first; tokens of
// probability 0 are left out of the top.
TokenLogprob LogprobOf(absl::Span<const float> logits, int32_t token, int top);

}  // namespace longspan
