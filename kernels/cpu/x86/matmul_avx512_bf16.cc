// Products of BF16 weights and x rounded to BF16, by AVX-512 BF16's dot product.
#if !defined(__clang__)
// GCC bug 105593, as in matmul_avx512.cc.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <algorithm>

#include "kernels/cpu/prefetch.h"
#include "kernels/cpu/x86/blocks_avx2.h"
#include "kernels/cpu/x86/float_tiles_avx512.h"
#include "kernels/cpu/x86/sets.h"

namespace longspan::cpu {
namespace {

LONGSPAN_AVX512_BF16 inline __m512bh LoadPairs(const void* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

struct Bf16Rows {
  template <int R, int C>
  LONGSPAN_AVX512_BF16 static void Multiply(const Bf16Tile& t, int64_t row, int64_t begin,
                                            int64_t end) {
    for (int64_t column = begin; column < end; column += C) MultiplyTile<R, C>(t, row, column);
  }

 private:
  // Outputs beyond t.columns are dropped.
  template <int R, int C>
  LONGSPAN_AVX512_BF16 static inline void MultiplyTile(const Bf16Tile& t, int64_t row,
                                                       int64_t column) {
    const uint16_t* x = t.x + row * t.x_stride;
    const std::byte* w[C];
    FindWeights(t, column, w);
    __m512 sum[R][C];
    LONGSPAN_UNROLL
    for (int r = 0; r < R; ++r) {
      LONGSPAN_UNROLL
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
    }
    const bool cold = t.cold && row == 0;
    const std::byte* next = FloatsAhead(w[0], C * t.weight_stride);
    for (int64_t i = 0; i < t.in; i += kBf16Padding) {
      if (cold) Prefetch<2 * kBf16Padding * C>(next + 2 * i * C);
      __m512bh weights[C];
      LONGSPAN_UNROLL
      for (int c = 0; c < C; ++c) weights[c] = LoadPairs(w[c] + 2 * i);
      LONGSPAN_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512bh v = LoadPairs(x + r * t.x_stride + i);
        LONGSPAN_UNROLL
        for (int c = 0; c < C; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], v, weights[c]);
      }
    }
    StoreSums<R, C>(t, row, column, sum);
  }
};

void Multiply(const Bf16Tile& t) { MultiplyInTiles<Bf16Rows>(t); }

LONGSPAN_AVX512_BF16 void Round(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    Store256(out + i, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i))));
  }
  if (i == count) return;
  const auto rest = static_cast<__mmask16>((1u << (count - i)) - 1);
  const __m512 last = _mm512_maskz_loadu_ps(rest, x + i);
  _mm256_mask_storeu_epi16(out + i, rest, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(last)));
}

}  // namespace

MatMulKernels Avx512Bf16MatMul(MatMulKernels kernels) {
  kernels.rounded_bf16 = {Round, Multiply};
  return kernels;
}

}  // namespace longspan::cpu
