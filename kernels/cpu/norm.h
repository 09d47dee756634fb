#pragma once
// The root-mean-square norm of one row, which more than one op needs.
#include <cstdint>

#include "kernels/cpu/simd.h"

namespace longspan::cpu {

// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
using NormRowFunction = void (*)(const float* x, const float* weight, int64_t dim, float eps,
                                 float* out);
NormRowFunction NormRowOf(Simd simd);

}  // namespace longspan::cpu
