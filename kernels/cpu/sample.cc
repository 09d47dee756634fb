// Draws tokens from rows of logits. Work is O(vocab) in a few vectorised passes a token; nothing is
// sorted but what lies at a border.
#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "kernels/cpu/context.h"
#include "kernels/cpu/ops_cpu.h"
#include "kernels/row_math.h"

namespace longspan::cpu {
namespace {

using Row = std::span<const float>;
using Edits = std::span<const LogitEdit>;

// What is left after min-p, top-k and top-p: tokens above `value`, and those equal to it with ids
// up to `last_tie`.
struct Cut {
  float value = kNoLogit;
  int32_t last_tie = std::numeric_limits<int32_t>::max();

  bool Keeps(float x, int32_t id) const { return x > value || (x == value && id <= last_tie); }
};

// Repetition (Keskar et al., arXiv 1909.05858) over prompt and output; frequency and presence over
// the output alone.
float Penalise(float logit, const LogitEdit& edit, const Draw& draw) {
  logit = logit > 0 ? logit / draw.repetition_penalty : logit * draw.repetition_penalty;
  logit -= draw.frequency_penalty * static_cast<float>(edit.count);
  if (edit.count > 0) logit -= draw.presence_penalty;
  return std::min(logit, std::numeric_limits<float>::max());
}

void Apply(const LogitEdit& edit, const Draw& draw, float& logit) {
  switch (edit.kind) {
    case LogitEdit::Kind::kBias:
      logit += edit.bias;
      break;
    case LogitEdit::Kind::kPenalty:
      // The clamp in Penalise must not make a number of what is none.
      if (std::isfinite(logit)) logit = Penalise(logit, edit, draw);
      break;
    case LogitEdit::Kind::kBan:
      logit = kNoLogit;
      break;
  }
}

int32_t SmallestAllowed(Edits edits, int32_t vocab) {
  const auto banned = [&](int32_t id) {
    return std::any_of(edits.begin(), edits.end(), [id](const LogitEdit& edit) {
      return edit.kind == LogitEdit::Kind::kBan && edit.token == id;
    });
  };
  int32_t id = 0;
  while (id < vocab && banned(id)) ++id;
  return id;
}

constexpr int kBins = 2048;  // of top-p's masses

// Of one thread, in its scratch.
struct Memory {
  using Candidate = std::pair<float, int32_t>;
  double* sums;           // [at least kBins and a row's blocks]
  Candidate* candidates;  // [vocab]
  float* values;          // [vocab + 2 * a row's blocks]
  float* edited;          // [vocab]

  Memory(BackendContext& context, int thread, Row row) {
    const size_t blocks = RowBlocks(row), all_sums = std::max<size_t>(kBins, blocks);
    sums = reinterpret_cast<double*>(
        context.Scratch(thread, all_sums * sizeof(double) + row.size() * sizeof(Candidate) +
                                    (2 * row.size() + 2 * blocks) * sizeof(float)));
    candidates = reinterpret_cast<Candidate*>(sums + all_sums);
    values = reinterpret_cast<float*>(candidates + row.size());
    edited = values + row.size() + 2 * blocks;
  }
};

// Draws one token from one row.
class Drawer {
 public:
  Drawer(Row row, const Draw& draw, const Memory& memory)
      : row_(row), draw_(draw), memory_(memory) {}

  // -1 when no logit is finite.
  int32_t Token() {
    const auto [highest, best] = RowMax(row_);
    highest_ = highest;
    if (best < 0 || draw_.inverse_temperature == 0) return best;
    FindCut();
    return Walk();
  }

 private:
  void FindCut() {
    cut_.value = static_cast<float>(highest_ + draw_.min_p_margin);
    if (draw_.top_k > 0 && draw_.top_k < static_cast<int64_t>(row_.size())) {
      cut_.value = std::max(cut_.value, RowNth(row_, draw_.top_k, memory_.values));
    }
    if (draw_.top_p < 1) CutTopP();
  }

  // Masses are gathered in bins of equal logit width, most likely first; only the bin in which the
  // sum reaches top_p is sorted.
  void CutTopP() {
    constexpr float kRange = 32;  // what is e^-32 times less likely than the best shares a bin
    const float inverse_temperature = draw_.inverse_temperature;
    const int64_t blocks = RowBlocks(row_);
    float x[kRowBlock], w[kRowBlock];
    float lowest = highest_;
    for (int64_t b = 0; b < blocks; ++b) {
      LoadBlock(row_, b, x);
      for (int i = 0; i < kRowBlock; ++i) {
        lowest = std::min(lowest, x[i] >= cut_.value && x[i] != kNoLogit ? x[i] : lowest);
      }
    }
    const float range = std::min(kRange, (highest_ - lowest) * inverse_temperature);
    const float scale = range > 0 ? (kBins - 1) / range : 0;
    auto bin_of = [&](float value) {
      const float distance = (highest_ - value) * inverse_temperature * scale;
      return distance < kBins - 1 ? static_cast<int>(distance) : kBins - 1;
    };

    double* sums = memory_.sums;
    std::fill(sums, sums + kBins, 0.0);
    for (int64_t b = 0; b < blocks; ++b) {
      LoadBlock(row_, b, x);
      if (BlockWeights(x, highest_, inverse_temperature, cut_.value, w) == 0) continue;
      for (int i = 0; i < kRowBlock; ++i) {
        if (w[i] > 0) sums[bin_of(x[i])] += w[i];
      }
    }
    double total = 0;
    for (int bin = 0; bin < kBins; ++bin) total += sums[bin];

    const double top_p = draw_.top_p;
    double above = 0;
    int border = 0;
    while (border < kBins - 1 && above + sums[border] < top_p * total) above += sums[border++];
    Memory::Candidate *candidates = memory_.candidates, *end = candidates;
    for (int64_t b = 0; b < blocks; ++b) {
      LoadBlock(row_, b, x);
      for (int i = 0; i < kRowBlock; ++i) {
        if (x[i] >= cut_.value && x[i] != kNoLogit && bin_of(x[i]) == border) {
          *end++ = {x[i], static_cast<int32_t>(b * kRowBlock + i)};
        }
      }
    }
    std::sort(candidates, end, MoreLikely);
    for (const auto& [value, id] : std::span(candidates, end)) {
      cut_ = {value, id};
      above += std::exp(static_cast<double>(value - highest_) * inverse_temperature);
      if (above >= top_p * total) break;
    }
  }

  // The weights of a block's kept tokens in w; returns their sum.
  double Weigh(int64_t block, float* w) const {
    float x[kRowBlock];
    LoadBlock(row_, block, x);
    double sum = BlockWeights(x, highest_, draw_.inverse_temperature, cut_.value, w);
    const bool cuts_ties = static_cast<int64_t>(cut_.last_tie) < (block + 1) * kRowBlock;
    if (sum == 0 || !cuts_ties) return sum;
    sum = 0;
    for (int i = 0; i < kRowBlock; ++i) {
      if (!cut_.Keeps(x[i], static_cast<int32_t>(block * kRowBlock + i))) w[i] = 0;
      sum += w[i];
    }
    return sum;
  }

  // Walks the kept tokens in order of id, so that a knob which cuts nothing changes nothing.
  int32_t Walk() {
    const int64_t blocks = RowBlocks(row_);
    float w[kRowBlock];
    double* sums = memory_.sums;
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) total += sums[b] = Weigh(b, w);

    double left = draw_.uniform * total;
    int64_t block = 0, last = 0;  // last: the last block with mass, should rounding walk past it
    for (; block < blocks && left >= sums[block]; ++block) {
      left -= sums[block];
      if (sums[block] > 0) last = block;
    }
    if (block == blocks) block = last;
    Weigh(block, w);
    int32_t id = 0;
    for (int i = 0; i < kRowBlock; ++i) {
      if (w[i] == 0) continue;
      id = static_cast<int32_t>(block * kRowBlock + i);
      left -= w[i];
      if (left < 0) break;
    }
    return id;
  }

  const Row row_;
  const Draw& draw_;
  float highest_ = kNoLogit;
  Cut cut_;
  const Memory& memory_;
};

}  // namespace

void Sample(BackendContext& context, const SampleArgs& a) {
  const size_t vocab = a.logits.shape[1];
  context.team.For(a.tokens.shape[0], 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const Draw& draw = a.draws[i];
      const Edits edits(a.edits + draw.edit_begin, draw.edit_end - draw.edit_begin);
      Row row(a.logits.as<float>() + draw.row * a.logits.stride[0], vocab);
      const Memory memory(context, thread, row);
      if (!edits.empty()) {
        std::copy(row.begin(), row.end(), memory.edited);
        for (const LogitEdit& edit : edits) Apply(edit, draw, memory.edited[edit.token]);
        row = {memory.edited, vocab};
      }
      const int32_t token = Drawer(row, draw, memory).Token();
      a.tokens.as<int32_t>()[i] =
          token >= 0 ? token : SmallestAllowed(edits, static_cast<int32_t>(vocab));
    }
  });
}

}  // namespace longspan::cpu
