#pragma once
// (logits row, knobs, seed, position) → token. Independent of batch neighbours and of earlier
// calls: the random number of output position i is a counter-based hash of (seed, choice index, i).
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "engine/request.h"

namespace longspan {

// Token counts that penalties need, kept by the sequence.
struct TokenHistory {
  explicit TokenHistory(int vocab) : in_prompt(vocab), output_count(vocab) {}
  void AddPrompt(int32_t token);
  void AddOutput(int32_t token);

  std::vector<bool> in_prompt;
  std::vector<int32_t> output_count;
  std::vector<int32_t> seen;  // each token of prompt and output once
};

struct SampleInput {
  absl::Span<const float> logits;  // [vocab], not modified
  const SamplingParams* params = nullptr;
  uint64_t seed = 0;
  int choice = 0;
  int64_t position = 0;                   // of the output token, from 0
  const TokenHistory* history = nullptr;  // nullptr: no penalties
  absl::Span<const int32_t> banned;       // ids that may not be chosen (eos before min_tokens)
  int top_logprobs = -1;                  // -1: no logprobs
};

struct Sampled {
  int32_t token = 0;
  TokenLogprob logprob;  // of the raw model distribution (before knobs), as vLLM
};

// What is left after min-p, top-k and top-p: tokens above `value`, and those equal to it with ids
// up to `last_tie`.
struct SampleCut {
  float value;
  int32_t last_tie;
};

// Order of the knobs, vLLM's: bias, penalties, then greedy if temperature is 0; else temperature,
// min-p, top-k, top-p, draw. A tie at top-k's border keeps all that tie; at top-p's border smaller
// ids win. Non-finite logits are treated as -infinity; if all are, the smallest id that is not
// banned is taken. Work is O(vocab) in a few vectorised passes; nothing is sorted but what lies at
// a border.
class Sampler {
 public:
  Sampled Sample(const SampleInput& input);  // keeps scratch between calls; one thread

 private:
  // The row after bias, penalties and bans: the input itself where no knob touches it.
  absl::Span<const float> Adjust(const SampleInput& input);
  SampleCut Cut(absl::Span<const float> row, float highest, const SamplingParams& params);
  SampleCut CutTopP(absl::Span<const float> row, float highest, float inverse_temperature,
                    SampleCut cut, double top_p);
  SampleCut CutTopPInBins(absl::Span<const float> row, float highest, float inverse_temperature,
                          SampleCut cut, double top_p);
  int32_t Draw(absl::Span<const float> row, float highest, float inverse_temperature, SampleCut cut,
               double uniform);

  std::vector<float> work_;
  std::vector<double> sums_;
  std::vector<std::pair<float, int32_t>> sorted_;
};

// Uniform in [0, 1), a pure function of its arguments.
double UniformAt(uint64_t seed, int choice, int64_t position);

// log-softmax value, rank and the `top` most likely of one row, most likely first. Equal logits
// rank by id, smaller first; tokens of probability 0 are left out of the top.
TokenLogprob LogprobOf(absl::Span<const float> logits, int32_t token, int top);

}  // namespace longspan
