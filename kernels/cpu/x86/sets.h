#pragma once
// The tables of x86's instruction sets.
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/dot_loops.h"
#include "kernels/cpu/matmul_kernels.h"

namespace longspan::cpu {

extern const MatMulKernels kAvx2MatMul;
// The AVX2 table with the entries that AVX-512 does better.
MatMulKernels Avx512MatMul(MatMulKernels kernels);
MatMulKernels Avx512Bf16MatMul(MatMulKernels kernels);

extern const AttentionTile kAvx2AttentionTile;
extern const AttentionTile kAvx512AttentionTile;

extern const DotLoops kAvx2DotLoops;
extern const DotLoops kAvx512DotLoops;
extern const DotLoops kAvx512Bf16DotLoops;

}  // namespace longspan::cpu
