#pragma once
// Eight floats at a time, in plain C++ that a compiler turns into AVX2 inside functions marked
// LONGSPAN_AVX2 and into baseline instructions elsewhere. Everything here is inlined into its
// caller, so one text serves both; callers take Lanes by reference only.
#include <cstdint>

#include "kernels/cpu/target.h"

namespace longspan::cpu {

inline constexpr int kLanes = 8;
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));

typedef int32_t IntLanes __attribute__((vector_size(32), aligned(4), may_alias));

// out = e^x for x <= 88, relative error below 2e-7 (degree-6 polynomial on [-ln2/2, ln2/2]); 0
// below -87. Written in lanes because compilers leave the scalar form, with its selects,
// unvectorised.
LONGSPAN_INLINE void Exp(const Lanes& x, Lanes& out) {
  const Lanes zero = {};
  const Lanes low = zero - 87.0f, high = zero + 88.0f;
  Lanes clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  const Lanes scaled = clamped * 1.44269504088896341f;
  const Lanes half = zero + 0.5f;
  const IntLanes n = __builtin_convertvector(scaled + (scaled < zero ? -half : half), IntLanes);
  const Lanes whole = __builtin_convertvector(n, Lanes);
  const Lanes r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Lanes e = p * (r * r) + r + 1.0f;
  const IntLanes bits = (n + 127) << 23;
  const Lanes scaled_back = e * reinterpret_cast<const Lanes&>(bits);
  out = x < low ? zero : scaled_back;
}

}  // namespace longspan::cpu
