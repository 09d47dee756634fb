#pragma once
// What the op Sample draws a token by: knobs and changes of logits, as plain values that a device
// can read. std only: nvcc compiles this.
#include <cstdint>
#include <limits>

namespace longspan {

// A change to one logit, before anything else looks at it. Changes of a kind name each token once
// (bans may repeat); biases come before penalties and those before bans.
struct LogitEdit {
  enum class Kind : int32_t { kBias, kPenalty, kBan };
  Kind kind = Kind::kBias;
  int32_t token = 0;
  float bias = 0;     // kBias: added
  int32_t count = 0;  // kPenalty: times in the output
};

// One token to draw. The order of the knobs is vLLM's: edits, then greedy if inverse_temperature is
// 0; else min-p, top-k, top-p, and the draw from what is left by its softmax.
struct Draw {
  int32_t row = 0;  // of the logits
  int32_t edit_begin = 0, edit_end = 0;
  int32_t top_k = 0;              // 0: off
  float top_p = 1;                // 1: off
  float inverse_temperature = 0;  // 0: greedy
  float presence_penalty = 0, frequency_penalty = 0, repetition_penalty = 1;
  // Logits lower than the highest plus this are cut: temperature * ln(min_p).
  double min_p_margin = -std::numeric_limits<double>::infinity();
  double uniform = 0;  // [0, 1): which token of those in question, walked in order of id
};

}  // namespace longspan
