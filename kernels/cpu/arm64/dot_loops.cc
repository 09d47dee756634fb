#include "kernels/cpu/dot_loops.h"

#include <arm_neon.h>

#include "kernels/cpu/arm64/sets.h"
#include "kernels/cpu/target.h"

namespace longspan::cpu {
namespace {

constexpr int kChains = 20;  // up to four units, a latency of four

// Empty assembly makes the compiler believe that a value is used and changed.
void Float() {
  float32x4_t sum[kChains], a = vdupq_n_f32(1), b = vdupq_n_f32(1e-9f);
  for (float32x4_t& s : sum) s = vdupq_n_f32(0);
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      sum[c] = vfmaq_f32(sum[c], a, b);
      asm volatile("" : "+w"(sum[c]));
    }
  }
}

void Int8() {
  const int8x8_t a = vdup_n_s8(3), b = vdup_n_s8(5);
  int16x8_t sum[kChains];
  for (int16x8_t& s : sum) s = vdupq_n_s16(0);
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      sum[c] = vmlal_s8(sum[c], a, b);
      asm volatile("" : "+w"(sum[c]));
    }
  }
}

LONGSPAN_NEON_DOT void Int8Dot() {
  const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
  int32x4_t sum[kChains];
  for (int32x4_t& s : sum) s = vdupq_n_s32(0);
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      sum[c] = vdotq_s32(sum[c], a, b);
      asm volatile("" : "+w"(sum[c]));
    }
  }
}

constexpr DotLoop kFloat = {Float, kDotIterations* kChains * 8};

}  // namespace

const DotLoops kNeonDotLoops = {
    .f32 = kFloat, .bf16 = kFloat, .int8 = {Int8, kDotIterations* kChains * 16}};
const DotLoops kNeonDotDotLoops = {
    .f32 = kFloat, .bf16 = kFloat, .int8 = {Int8Dot, kDotIterations* kChains * 32}};

}  // namespace longspan::cpu
