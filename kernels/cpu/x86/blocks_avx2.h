#pragma once
// Levels and scales of weight blocks in AVX2 registers; also what the AVX-512 kernels unpack with.
#include <immintrin.h>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/target.h"

namespace longspan::cpu {

LONGSPAN_AVX2 inline __m256i Load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

LONGSPAN_AVX2 inline void Store256(void* p, __m256i v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v);
}

// 16 bytes as 32 nibbles: all low ones, then all high ones.
LONGSPAN_AVX2 inline __m256i Nibbles(const uint8_t* q) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
  const __m256i both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

// 32 bytes' low (odd: high) nibbles.
LONGSPAN_AVX2 inline __m256i NibblesOf32(const uint8_t* q, bool high) {
  const __m256i bytes = Load256(q);
  const __m256i chosen = high ? _mm256_srli_epi16(bytes, 4) : bytes;
  return _mm256_and_si256(chosen, _mm256_set1_epi8(15));
}

// Byte i is `value` where bit i of `bits` is set, else 0.
LONGSPAN_AVX2 inline __m256i SpreadBits(const uint8_t bits[4], char value) {
  int word;
  std::memcpy(&word, bits, 4);
  const __m256i order =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i each = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(word), order);
  const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, each), each);
  return _mm256_and_si256(set, _mm256_set1_epi8(value));
}

// The 32 levels of one run, as Format::Levels gives them.
LONGSPAN_AVX2 inline __m256i LoadLevels(const BlockQ8_0& block, int) {
  return _mm256_xor_si256(Load256(block.q), _mm256_set1_epi8(-128));
}

LONGSPAN_AVX2 inline __m256i LoadLevels(const BlockQ4_0& block, int) { return Nibbles(block.q); }

LONGSPAN_AVX2 inline __m256i LoadLevels(const BlockQ5_0& block, int) {
  return _mm256_or_si256(Nibbles(block.q), SpreadBits(block.high, 16));
}

LONGSPAN_AVX2 inline __m256i LoadLevels(const BlockQ4_K& block, int run) {
  return NibblesOf32(block.q + 32 * (run / 2), run % 2 != 0);
}

LONGSPAN_AVX2 inline __m256i LoadLevels(const BlockQ5_K& block, int run) {
  const __m256i low = NibblesOf32(block.q + 32 * (run / 2), run % 2 != 0);
  const __m256i bit = _mm256_and_si256(
      _mm256_srl_epi16(Load256(block.high), _mm_cvtsi32_si128(run)), _mm256_set1_epi8(1));
  return _mm256_or_si256(low, _mm256_slli_epi16(bit, 4));
}

LONGSPAN_AVX2 inline __m256i LoadLevels(const BlockQ6_K& block, int run) {
  const int half = run / 4, quarter = run % 4;
  const __m256i low = NibblesOf32(block.low + 64 * half + 32 * (quarter % 2), quarter >= 2);
  const __m256i high =
      _mm256_srl_epi16(Load256(block.high + 32 * half), _mm_cvtsi32_si128(2 * quarter));
  return _mm256_or_si256(low, _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(3)), 4));
}

// Lane j of vector i becomes lane i of vector j.
LONGSPAN_AVX2 inline void Transpose8(__m256i v[8]) {
  __m256i a[8], b[8];
  LONGSPAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  LONGSPAN_UNROLL
  for (int i = 0; i < 2; ++i) {
    b[4 * i] = _mm256_unpacklo_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 1] = _mm256_unpackhi_epi64(a[4 * i], a[4 * i + 2]);
    b[4 * i + 2] = _mm256_unpacklo_epi64(a[4 * i + 1], a[4 * i + 3]);
    b[4 * i + 3] = _mm256_unpackhi_epi64(a[4 * i + 1], a[4 * i + 3]);
  }
  LONGSPAN_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

template <class Block>
const Block& BlockAt(const std::byte* output, int64_t index) {
  return reinterpret_cast<const Block*>(output)[index];
}

}  // namespace longspan::cpu
