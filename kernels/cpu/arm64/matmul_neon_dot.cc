// MatMul's products of blocks by the dot product of four bytes.
#include <arm_neon.h>

#include "kernels/cpu/arm64/sets.h"
#include "kernels/cpu/panels.h"
#include "kernels/cpu/target.h"

#define LONGSPAN_TARGET LONGSPAN_NEON_DOT

namespace longspan::cpu {
namespace {

template <int kStep, int R, int V>
LONGSPAN_TARGET LONGSPAN_INLINE void AddStep(const int8_t* levels, const int8x16_t (&x)[R],
                                             int32x4_t (&dot)[R][V]) {
  LONGSPAN_UNROLL
  for (int v = 0; v < V; ++v) {
    const int8x16_t w = vld1q_s8(levels + kStepBytes * kStep + 16 * v);
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) dot[r][v] = vdotq_laneq_s32(dot[r][v], w, x[r], kStep);
  }
}

// Adds the products of four steps' levels and the 16 numbers at q, of R rows `stride` apart.
template <int, int R, int V>
LONGSPAN_TARGET LONGSPAN_INLINE void AddSteps(const int8_t* levels, const int8_t* q, int64_t stride,
                                              int32x4_t (&dot)[R][V]) {
  int8x16_t x[R];
  LONGSPAN_UNROLL
  for (int r = 0; r < R; ++r) x[r] = vld1q_s8(q + r * stride);
  AddStep<0>(levels, x, dot);
  AddStep<1>(levels, x, dot);
  AddStep<2>(levels, x, dot);
  AddStep<3>(levels, x, dot);
}

}  // namespace
}  // namespace longspan::cpu

#include "kernels/cpu/arm64/blocks_neon.inl"

namespace longspan::cpu {

MatMulKernels NeonDotMatMul(MatMulKernels kernels) { return WithBlocks(kernels); }

}  // namespace longspan::cpu
