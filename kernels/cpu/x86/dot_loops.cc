#include "kernels/cpu/dot_loops.h"

#include <immintrin.h>

#include "kernels/cpu/target.h"
#include "kernels/cpu/x86/sets.h"

namespace longspan::cpu {
namespace {

// Empty assembly makes the compiler believe that a value is used and changed.
LONGSPAN_AVX2 void FloatAvx2() {
  __m256 sum[kDotChains], a = _mm256_set1_ps(1), b = _mm256_set1_ps(1e-9f);
  LONGSPAN_UNROLL
  for (int c = 0; c < kDotChains; ++c) sum[c] = _mm256_setzero_ps();
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kDotChains; ++c) {
      sum[c] = _mm256_fmadd_ps(a, b, sum[c]);
      asm volatile("" : "+x"(sum[c]));
    }
  }
}

LONGSPAN_AVX2 void Int8Avx2() {
  __m256i sum[kDotChains], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  LONGSPAN_UNROLL
  for (int c = 0; c < kDotChains; ++c) sum[c] = _mm256_setzero_si256();
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kDotChains; ++c) {
      asm volatile("" : "+x"(a));
      sum[c] = _mm256_add_epi16(sum[c], _mm256_maddubs_epi16(a, b));
      asm volatile("" : "+x"(sum[c]));
    }
  }
}

LONGSPAN_AVX512 void FloatAvx512() {
  __m512 sum[kDotChains], a = _mm512_set1_ps(1), b = _mm512_set1_ps(1e-9f);
  LONGSPAN_UNROLL
  for (int c = 0; c < kDotChains; ++c) sum[c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kDotChains; ++c) {
      sum[c] = _mm512_fmadd_ps(a, b, sum[c]);
      asm volatile("" : "+v"(sum[c]));
    }
  }
}

LONGSPAN_AVX512 void Int8Avx512() {
  __m512i sum[kDotChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  LONGSPAN_UNROLL
  for (int c = 0; c < kDotChains; ++c) sum[c] = _mm512_setzero_si512();
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kDotChains; ++c) {
      sum[c] = _mm512_dpbusd_epi32(sum[c], a, b);
      asm volatile("" : "+v"(sum[c]));
    }
  }
}

LONGSPAN_AVX512_BF16 void Bf16Avx512() {
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  __m512 sum[kDotChains];
  LONGSPAN_UNROLL
  for (int c = 0; c < kDotChains; ++c) sum[c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < kDotIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kDotChains; ++c) {
      sum[c] = _mm512_dpbf16_ps(sum[c], ones, ones);
      asm volatile("" : "+v"(sum[c]));
    }
  }
}

}  // namespace

const DotLoops kAvx2DotLoops = {
    .f32 = Chains(FloatAvx2, 16), .bf16 = Chains(FloatAvx2, 16), .int8 = Chains(Int8Avx2, 64)};
const DotLoops kAvx512DotLoops = {.f32 = Chains(FloatAvx512, 32),
                                  .bf16 = Chains(FloatAvx512, 32),
                                  .int8 = Chains(Int8Avx512, 128)};
const DotLoops kAvx512Bf16DotLoops = {.f32 = Chains(FloatAvx512, 32),
                                      .bf16 = Chains(Bf16Avx512, 64),
                                      .int8 = Chains(Int8Avx512, 128)};

}  // namespace longspan::cpu
