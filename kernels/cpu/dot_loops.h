#pragma once
// Loops of an instruction set's dot-product instructions on registers, for roofline.h.
#include <cstdint>

namespace longspan::cpu {

inline constexpr int64_t kDotIterations = 1 << 15;
// More than latency times width of the units that do them, where 16 registers must do.
inline constexpr int kDotChains = 10;

struct DotLoop {
  void (*run)();
  int64_t operations;  // of a run: a product and a sum are two
};

// Of a loop of kDotChains chains of an instruction that does so many.
constexpr DotLoop Chains(void (*run)(), int operations) {
  return {run, kDotIterations * kDotChains * operations};
}

struct DotLoops {
  DotLoop f32;
  DotLoop bf16;  // f32's where BF16 weights are widened
  DotLoop int8;
};

extern const DotLoops kPortableDotLoops;

}  // namespace longspan::cpu
