#pragma once
// Loops of an instruction set's dot-product instructions on registers, for roofline.h.
#include <cstdint>

namespace longspan::cpu {

inline constexpr int64_t kDotIterations = 1 << 15;
inline constexpr int kDotChains = 10;  // more than latency times width of the units that do them

// Does kDotIterations * kDotChains instructions and says how many operations one of them is.
struct DotLoop {
  void (*run)();
  int operations;
};

struct DotLoops {
  DotLoop f32;
  DotLoop bf16;  // f32's where BF16 weights are widened
  DotLoop int8;
};

extern const DotLoops kPortableDotLoops;

}  // namespace longspan::cpu
