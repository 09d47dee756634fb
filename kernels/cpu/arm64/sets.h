#pragma once
// The tables of Arm's instruction sets.
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/dot_loops.h"
#include "kernels/cpu/matmul_kernels.h"

namespace longspan::cpu {

// The portable table with the entries that NEON does better; the NEON table with those that its dot
// products do.
MatMulKernels NeonMatMul(MatMulKernels kernels);
MatMulKernels NeonDotMatMul(MatMulKernels kernels);

extern const AttentionTile kNeonAttentionTile;

extern const DotLoops kNeonDotLoops;     // of NEON's own products
extern const DotLoops kNeonDotDotLoops;  // of neon_dot's

}  // namespace longspan::cpu
