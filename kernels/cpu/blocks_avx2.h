#pragma once
// Levels and scales of weight blocks in AVX2 registers; also what the AVX-512 kernels unpack with.
#include <immintrin.h>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/target.h"

namespace longspan::cpu {

LONGSPAN_AVX2 inline __m256i Load256(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
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

// Asks for kBytes of memory at p and after; p may lie beyond what is mapped. Rows of a matrix are
// read several at a time, each too short for the processor to see a stream: the kernels ask for the
// next rows while they work on these.
template <int kBytes, bool kIntoL2 = false>
LONGSPAN_AVX2 inline void Prefetch(const std::byte* p) {
  LONGSPAN_UNROLL
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(p + i, 0, kIntoL2 ? 2 : 3);
}

template <class Block>
const Block& BlockAt(const std::byte* output, int64_t index) {
  return reinterpret_cast<const Block*>(output)[index];
}

// d * the eight bytes, one row of floats per output, transposed to [8 bytes][8 outputs] at `to`.
LONGSPAN_AVX2 inline void StoreScales(const float d[8], const uint64_t bytes[8], bool is_signed,
                                      float* to, int64_t stride) {
  __m256i rows[8];
  LONGSPAN_UNROLL
  for (int o = 0; o < 8; ++o) {
    const __m128i packed = _mm_cvtsi64_si128(static_cast<int64_t>(bytes[o]));
    const __m256i wide = is_signed ? _mm256_cvtepi8_epi32(packed) : _mm256_cvtepu8_epi32(packed);
    rows[o] = _mm256_castps_si256(_mm256_mul_ps(_mm256_set1_ps(d[o]), _mm256_cvtepi32_ps(wide)));
  }
  Transpose8(rows);
  LONGSPAN_UNROLL
  for (int g = 0; g < 8; ++g) {
    _mm256_storeu_ps(to + g * stride, _mm256_castsi256_ps(rows[g]));
  }
}

// Scales and mins of block `index` of 8 outputs: group g's at scales + g * stride, mins + g *
// stride.
template <class Format>
LONGSPAN_AVX2 inline void LoadScales(const std::byte* const outputs[8], int64_t index,
                                     float* scales, float* mins, int64_t stride) {
  using Block = typename Format::Block;
  if constexpr (Info(Format::kType).block_elements == 32) {
    const auto d = [&](int o) { return static_cast<int16_t>(BlockAt<Block>(outputs[o], index).d); };
    const __m128i halves = _mm_setr_epi16(d(0), d(1), d(2), d(3), d(4), d(5), d(6), d(7));
    _mm256_storeu_ps(scales, _mm256_cvtph_ps(halves));
  } else if constexpr (Format::kMin) {
    float d[8], dmin[8];
    uint64_t scale_bytes[8], min_bytes[8];
    for (int o = 0; o < 8; ++o) {
      const Block& block = BlockAt<Block>(outputs[o], index);
      d[o] = _cvtsh_ss(block.d);
      dmin[o] = _cvtsh_ss(block.dmin);
      SixBitPairs(block.scales, reinterpret_cast<uint8_t*>(scale_bytes + o),
                  reinterpret_cast<uint8_t*>(min_bytes + o));
    }
    StoreScales(d, scale_bytes, /*is_signed=*/false, scales, stride);
    StoreScales(dmin, min_bytes, /*is_signed=*/false, mins, stride);
  } else {
    float d[8];
    uint64_t bytes[2][8];
    for (int o = 0; o < 8; ++o) {
      const Block& block = BlockAt<Block>(outputs[o], index);
      d[o] = _cvtsh_ss(block.d);
      std::memcpy(&bytes[0][o], block.scales, 8);
      std::memcpy(&bytes[1][o], block.scales + 8, 8);
    }
    StoreScales(d, bytes[0], /*is_signed=*/true, scales, stride);
    StoreScales(d, bytes[1], /*is_signed=*/true, scales + 8 * stride, stride);
  }
}

}  // namespace longspan::cpu
