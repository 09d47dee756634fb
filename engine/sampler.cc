#include "engine/sampler.h"

#include <algorithm>
#include <cmath>

#include "kernels/row_math.h"

namespace longspan {
namespace {

// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

bool HasPenalties(const SamplingParams& params) {
  return params.presence_penalty != 0 || params.frequency_penalty != 0 ||
         params.repetition_penalty != 1;
}

void TokenHistory::AddPrompt(int32_t token) {
  if (!in_prompt[token] && output_count[token] == 0) seen.push_back(token);
  in_prompt[token] = true;
}

void TokenHistory::AddOutput(int32_t token) {
  if (!in_prompt[token] && output_count[token] == 0) seen.push_back(token);
  ++output_count[token];
}

double UniformAt(uint64_t seed, int choice, int64_t position) {
  uint64_t h = Mix(seed);
  h = Mix(h ^ static_cast<uint64_t>(choice));
  h = Mix(h ^ static_cast<uint64_t>(position));
  return static_cast<double>(h >> 11) * 0x1p-53;
}

void DrawList::Add(const DrawInput& input) {
  const SamplingParams& params = *input.params;
  Draw draw;
  draw.row = input.row;
  draw.edit_begin = static_cast<int32_t>(edits.size());
  for (const auto& [token, bias] : params.logit_bias) {
    edits.push_back(
        {.kind = LogitEdit::Kind::kBias, .token = static_cast<int32_t>(token), .bias = bias});
  }
  if (input.history != nullptr && HasPenalties(params)) {
    const TokenHistory& history = *input.history;
    for (const int32_t token : history.seen) {
      edits.push_back({.kind = LogitEdit::Kind::kPenalty,
                       .token = token,
                       .count = history.output_count[token]});
    }
    draw.presence_penalty = params.presence_penalty;
    draw.frequency_penalty = params.frequency_penalty;
    draw.repetition_penalty = params.repetition_penalty;
  }
  for (const int32_t token : input.banned) {
    edits.push_back({.kind = LogitEdit::Kind::kBan, .token = token});
  }
  draw.edit_end = static_cast<int32_t>(edits.size());
  if (params.temperature > 0) {
    draw.inverse_temperature =
        std::min(1.0f / params.temperature, std::numeric_limits<float>::max());
    draw.uniform = UniformAt(input.seed, input.choice, input.position);
    draw.top_k = static_cast<int32_t>(params.top_k);
    draw.top_p = params.top_p;
    // p >= min_p * p_max, taken to logits.
    draw.min_p_margin =
        static_cast<double>(params.temperature) * std::log(static_cast<double>(params.min_p));
  }
  draws.push_back(draw);
}

TokenLogprob LogprobOf(absl::Span<const float> logits, int32_t token, int top) {
  const float highest = RowMax(logits).first;
  const double log_sum = highest == kNoLogit ? 0 : highest + std::log(RowSum(logits, highest, 1));
  auto describe = [&](float logit, int32_t id, int rank) {
    TokenLogprob entry;
    entry.token = id;
    entry.logprob = static_cast<float>(logit - log_sum);
    entry.rank = rank;
    return entry;
  };
  const float logit = std::isfinite(logits[token]) ? logits[token] : kNoLogit;
  TokenLogprob result = describe(logit, token, 1 + RowRank(logits, token));
  std::vector<std::pair<float, int32_t>> best;
  RowTop(logits, top, &best);
  std::sort(best.begin(), best.end(), MoreLikely);
  if (static_cast<int64_t>(best.size()) > top) best.resize(top);
  for (size_t i = 0; i < best.size(); ++i) {
    result.top.push_back(describe(best[i].first, best[i].second, static_cast<int>(i) + 1));
  }
  return result;
}

}  // namespace longspan
