#pragma once
// (logits row, knobs, seed, position) → token. Independent of batch neighbours and of earlier calls:
// the random number of output position i is a counter-based hash of (seed, choice index, i).
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/request.h"

namespace longspan {

// Token counts that penalties need, kept by the sequence.
struct TokenHistory {
  explicit TokenHistory(int vocab) : in_prompt(vocab), output_count(vocab) {}
  std::vector<bool> in_prompt;
  std::vector<int32_t> output_count;
};

struct SampleInput {
  absl::Span<const float> logits;             // [vocab], not modified
  const SamplingParams* params = nullptr;
  uint64_t seed = 0;
  int choice = 0;
  int64_t position = 0;                       // of the output token, from 0
  const TokenHistory* history = nullptr;      // nullptr: no penalties
  absl::Span<const int32_t> banned;           // ids that may not be chosen (eos before min_tokens)
  int top_logprobs = -1;                      // -1: no logprobs
};

struct Sampled {
  int32_t token = 0;
  TokenLogprob logprob;                       // of the raw model distribution (before knobs), as vLLM
};

// Order of the knobs, vLLM's: bias, penalties, then greedy if temperature is 0; else temperature, min-p,
// top-k, top-p, draw. Non-finite logits are treated as -infinity; if all are, the smallest id is taken.
class Sampler {
 public:
  Sampled Sample(const SampleInput& input);   // keeps scratch between calls; one thread

 private:
  std::vector<float> work_;
  std::vector<std::pair<float, int32_t>> sorted_;
};

// log-softmax value, rank and the `top` most likely of one row.
TokenLogprob LogprobOf(absl::Span<const float> logits, int32_t token, int top);

}  // namespace longspan
