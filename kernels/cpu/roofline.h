#pragma once
// What this machine can do at most, measured: the rulers that kernels are held against. Each call
// takes a few tenths of a second and gives the best of several runs.
#include "kernels/cpu/simd.h"

namespace longspan {

enum class DotKind : unsigned char {
  kFloat,  // fp32 fused multiply-adds
  kBf16,   // pairs of bf16 products added in fp32; kFloat where BF16 weights are widened instead
  kInt8,   // 8-bit products added in pairs, the instruction that block kernels are made of
};

// Bytes per second that `threads` threads read together from memory far larger than the caches.
double MeasuredReadBandwidth(int threads);

// Operations per second (a product and a sum are two) of the dot-product instruction on registers.
double MeasuredDotRate(int threads, Simd simd, DotKind kind);

}  // namespace longspan
