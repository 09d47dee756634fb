#include "engine/sampler.h"

#include <algorithm>
#include <cmath>

#include "engine/row_math.h"
#include "kernels/check.h"

namespace longspan {
namespace {

// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

bool HasPenalties(const SamplingParams& params) {
  return params.presence_penalty != 0 || params.frequency_penalty != 0 ||
         params.repetition_penalty != 1;
}

// Repetition (Keskar et al., arXiv 1909.05858) over prompt and output; frequency and presence over
// the output alone.
float Penalise(float logit, bool in_prompt, int32_t count, const SamplingParams& params) {
  if (in_prompt || count > 0) {
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
  }
  logit -= params.frequency_penalty * static_cast<float>(count);
  if (count > 0) logit -= params.presence_penalty;
  return std::min(logit, std::numeric_limits<float>::max());
}

float InverseOf(float temperature) {
  return std::min(1.0f / temperature, std::numeric_limits<float>::max());
}

bool Keeps(SampleCut cut, float value, int32_t id) {
  return value > cut.value || (value == cut.value && id <= cut.last_tie);
}

int32_t SmallestAllowed(absl::Span<const int32_t> banned) {
  int32_t id = 0;
  while (std::find(banned.begin(), banned.end(), id) != banned.end()) ++id;
  return id;
}

}  // namespace

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

absl::Span<const float> Sampler::Adjust(const SampleInput& input) {
  const SamplingParams& params = *input.params;
  const bool penalties = input.history != nullptr && HasPenalties(params);
  if (params.logit_bias.empty() && !penalties && input.banned.empty()) return input.logits;
  work_.assign(input.logits.begin(), input.logits.end());
  for (const auto& [id, bias] : params.logit_bias) work_[id] += bias;
  if (penalties) {
    const TokenHistory& history = *input.history;
    for (const int32_t id : history.seen) {
      // The clamp in Penalise must not make a number of what is none.
      if (!std::isfinite(work_[id])) continue;
      work_[id] = Penalise(work_[id], history.in_prompt[id], history.output_count[id], params);
    }
  }
  for (const int32_t id : input.banned) work_[id] = kNoLogit;
  return work_;
}

SampleCut Sampler::Cut(absl::Span<const float> row, float highest, const SamplingParams& params) {
  SampleCut cut{kNoLogit, std::numeric_limits<int32_t>::max()};
  if (params.min_p > 0) {
    // p >= min_p * p_max, taken to logits.
    cut.value = static_cast<float>(highest + static_cast<double>(params.temperature) *
                                                 std::log(static_cast<double>(params.min_p)));
  }
  if (params.top_k > 0 && params.top_k < static_cast<int64_t>(row.size())) {
    RowTop(row, params.top_k, &sorted_);
    if (static_cast<int64_t>(sorted_.size()) >= params.top_k) {
      const auto last = std::min_element(sorted_.begin(), sorted_.end());
      cut.value = std::max(cut.value, last->first);
    }
  }
  if (params.top_p < 1) {
    cut = CutTopP(row, highest, InverseOf(params.temperature), cut, params.top_p);
  }
  return cut;
}

// Masses are gathered in bins of equal logit width, most likely first; only the bin in which the
// sum reaches top_p is sorted.
SampleCut Sampler::CutTopP(absl::Span<const float> row, float highest, float inverse_temperature,
                           SampleCut cut, double top_p) {
  constexpr int kBins = 2048;
  constexpr float kRange = 32;  // what is e^-32 times less likely than the best shares the last bin
  const int64_t blocks = RowBlocks(row);
  float x[kRowBlock], w[kRowBlock];
  float lowest = highest;
  for (int64_t b = 0; b < blocks; ++b) {
    LoadBlock(row, b, x);
    for (int i = 0; i < kRowBlock; ++i) {
      lowest = std::min(lowest, x[i] >= cut.value && x[i] != kNoLogit ? x[i] : lowest);
    }
  }
  const float range = std::min(kRange, (highest - lowest) * inverse_temperature);
  const float scale = range > 0 ? (kBins - 1) / range : 0;
  auto bin_of = [&](float value) {
    const float distance = (highest - value) * inverse_temperature * scale;
    return distance < kBins - 1 ? static_cast<int>(distance) : kBins - 1;
  };

  sums_.assign(kBins, 0);
  for (int64_t b = 0; b < blocks; ++b) {
    LoadBlock(row, b, x);
    if (BlockWeights(x, highest, inverse_temperature, cut.value, w) == 0) continue;
    for (int i = 0; i < kRowBlock; ++i) {
      if (w[i] > 0) sums_[bin_of(x[i])] += w[i];
    }
  }
  double total = 0;
  for (const double sum : sums_) total += sum;

  double above = 0;
  int border = 0;
  while (border < kBins - 1 && above + sums_[border] < top_p * total) above += sums_[border++];
  sorted_.clear();
  for (int64_t b = 0; b < blocks; ++b) {
    LoadBlock(row, b, x);
    for (int i = 0; i < kRowBlock; ++i) {
      if (x[i] >= cut.value && x[i] != kNoLogit && bin_of(x[i]) == border) {
        sorted_.emplace_back(x[i], static_cast<int32_t>(b * kRowBlock + i));
      }
    }
  }
  std::sort(sorted_.begin(), sorted_.end(), MoreLikely);
  for (const auto& [value, id] : sorted_) {
    cut = {value, id};
    above += std::exp(static_cast<double>(value - highest) * inverse_temperature);
    if (above >= top_p * total) break;
  }
  return cut;
}

// Walks the kept tokens in order of id, so that a knob which cuts nothing changes nothing.
int32_t Sampler::Draw(absl::Span<const float> row, float highest, float inverse_temperature,
                      SampleCut cut, double uniform) {
  const int64_t blocks = RowBlocks(row);
  float x[kRowBlock], w[kRowBlock];
  auto weigh = [&](int64_t b) -> double {
    LoadBlock(row, b, x);
    double sum = BlockWeights(x, highest, inverse_temperature, cut.value, w);
    const bool cuts_ties = static_cast<int64_t>(cut.last_tie) < (b + 1) * kRowBlock;
    if (sum == 0 || !cuts_ties) return sum;
    sum = 0;
    for (int i = 0; i < kRowBlock; ++i) {
      if (!Keeps(cut, x[i], static_cast<int32_t>(b * kRowBlock + i))) w[i] = 0;
      sum += w[i];
    }
    return sum;
  };
  sums_.resize(blocks);
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += sums_[b] = weigh(b);

  double left = uniform * total;
  int64_t block = 0, last = 0;  // last: the last block with mass, should rounding walk past the end
  for (; block < blocks && left >= sums_[block]; ++block) {
    left -= sums_[block];
    if (sums_[block] > 0) last = block;
  }
  if (block == blocks) block = last;
  weigh(block);
  int32_t id = 0;
  for (int i = 0; i < kRowBlock; ++i) {
    if (w[i] == 0) continue;
    id = static_cast<int32_t>(block * kRowBlock + i);
    left -= w[i];
    if (left < 0) break;
  }
  return id;
}

Sampled Sampler::Sample(const SampleInput& input) {
  const SamplingParams& params = *input.params;
  Sampled sampled;
  const absl::Span<const float> row = Adjust(input);
  const auto [highest, best] = RowMax(row);
  if (best < 0) {
    sampled.token = SmallestAllowed(input.banned);
  } else if (params.temperature == 0) {
    sampled.token = best;
  } else {
    sampled.token = Draw(row, highest, InverseOf(params.temperature), Cut(row, highest, params),
                         UniformAt(input.seed, input.choice, input.position));
  }
  CHECK_LT(sampled.token, static_cast<int64_t>(row.size())) << "every token is banned";
  if (input.top_logprobs >= 0) {
    sampled.logprob = LogprobOf(input.logits, sampled.token, input.top_logprobs);
  }
  return sampled;
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
