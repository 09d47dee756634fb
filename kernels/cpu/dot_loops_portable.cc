#include "kernels/cpu/dot_loops.h"

namespace longspan::cpu {
namespace {

// Empty assembly makes the compiler believe that a value is used and changed. "x" is a register of
// vectors on x86 and on Arm.
void Float() {
  float sum[kDotChains] = {};
  float a = 1, b = 1e-9f;
  for (int64_t i = 0; i < kDotIterations; ++i) {
    for (float& s : sum) {
      s += a * b;
      asm volatile("" : "+x"(s));
    }
  }
}

void Int8() {
  int32_t sum[kDotChains] = {};
  int8_t a = 3, b = 5;
  for (int64_t i = 0; i < kDotIterations; ++i) {
    for (int32_t& s : sum) {
      s += a * b;
      asm volatile("" : "+r"(s));
    }
  }
}

}  // namespace

const DotLoops kPortableDotLoops = {
    .f32 = Chains(Float, 2), .bf16 = Chains(Float, 2), .int8 = Chains(Int8, 2)};

}  // namespace longspan::cpu
