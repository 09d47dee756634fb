#pragma once
// Eight floats at a time, in plain C++ that a compiler turns into AVX2 inside functions marked
// LONGSPAN_AVX2 and into baseline instructions elsewhere. Everything here is inlined into its
// caller, so one text serves both; callers take Lanes by reference only.
#include <cstdint>
#include <cstring>

#define LONGSPAN_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LONGSPAN_INLINE inline __attribute__((always_inline))

namespace longspan::cpu {

inline constexpr int kLanes = 8;
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));

// e^x for x <= 88, relative error below 2e-7 (degree-6 polynomial on [-ln2/2, ln2/2]); 0 below -87.
LONGSPAN_INLINE float Exp(float x) {
  const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float scaled = clamped * 1.44269504088896341f;
  const int32_t n = static_cast<int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
  const float whole = static_cast<float>(n);
  const float r = (clamped - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float e = p * (r * r) + r + 1.0f;
  const int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : e * power;
}

}  // namespace longspan::cpu
