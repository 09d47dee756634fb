#pragma once
// Weight blocks as GGUF stores them (little-endian, no padding), and plain numbers of 16 bits.
//
// Every quantised type is seen in one way: an element is an unsigned `level` of at most 8 bits, and
// with g the group of elements that share a scale,
//   value = scale[g] * (level - kOffset) - min[g].
// A Format below gives, for one block type, these constants, the levels of 32 consecutive elements
// in order, and the scales and mins of a block. Block sizes: kernels/dtype.h.
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/dtype.h"

namespace longspan {

// Exact; subnormals, infinities and NaN included.
inline float HalfToFloat(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  // The exponent moves from bias 15 to 127 by a product, which also normalises subnormals.
  float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  if (magnitude >= 0x7c00u) value = std::bit_cast<float>(0x7f800000u | (magnitude << 13));
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | (half & 0x8000u) << 16);
}

inline float BrainToFloat(uint16_t brain) {
  return std::bit_cast<float>(static_cast<uint32_t>(brain) << 16);
}

// 32 elements, signed bytes times d.
struct BlockQ8_0 {
  uint16_t d;  // F16
  int8_t q[32];
};

// 32 elements of 4 bits: byte i holds element i (low) and i + 16 (high); value d * (q - 8).
struct BlockQ4_0 {
  uint16_t d;
  uint8_t q[16];
};

// 32 elements of 5 bits: the low four as in Q4_0, the fifth of element i is bit i of `high`;
// value d * (q - 16).
struct BlockQ5_0 {
  uint16_t d;
  uint8_t high[4];
  uint8_t q[16];
};

// 256 elements in 8 groups of 32, value d * scale * q - dmin * min with 6-bit scales and mins (see
// SixBitPairs). Of each 64 elements, 32 bytes hold the first 32 (low) and the last 32 (high).
struct BlockQ4_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t q[128];
};

// Q4_K with a fifth bit: bit g of high[i] belongs to element i of group g.
struct BlockQ5_K {
  uint16_t d;
  uint16_t dmin;
  uint8_t scales[12];
  uint8_t high[32];
  uint8_t q[128];
};

// 256 elements in 16 groups of 16, value d * scale * (q - 32). Each half of 128 elements is four
// runs of 32: low[0:32] and low[32:64] hold the low four bits of runs 0 and 1 (low nibble), 2 and 3
// (high nibble); bits 2r and 2r + 1 of high[i] are the upper two of element i of run r.
struct BlockQ6_K {
  uint8_t low[128];
  uint8_t high[64];
  int8_t scales[16];
  uint16_t d;
};

static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18 && sizeof(BlockQ5_0) == 22);
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210);

// Unpacks 8 scales and 8 mins of 6 bits. Bytes 0-3 hold scales 0-3 and bytes 4-7 mins 0-3 in their
// low six bits; bytes 8-11 hold the low nibbles of scales (low) and mins (high) 4-7, whose upper
// two bits are the top bits of bytes 0-3 and 4-7.
inline void SixBitPairs(const uint8_t packed[12], uint8_t scales[8], uint8_t mins[8]) {
  uint32_t word[3];
  std::memcpy(word, packed, sizeof(word));
  const uint32_t scales_low = word[0] & 0x3f3f3f3fu;
  const uint32_t mins_low = word[1] & 0x3f3f3f3fu;
  const uint32_t scales_high = (word[2] & 0x0f0f0f0fu) | ((word[0] >> 2) & 0x30303030u);
  const uint32_t mins_high = ((word[2] >> 4) & 0x0f0f0f0fu) | ((word[1] >> 2) & 0x30303030u);
  std::memcpy(scales, &scales_low, 4);
  std::memcpy(scales + 4, &scales_high, 4);
  std::memcpy(mins, &mins_low, 4);
  std::memcpy(mins + 4, &mins_high, 4);
}

// kBits: bits of a level. kGroup: elements that share a scale. Levels(block, run, out): the 32
// levels of elements [32 * run, 32 * run + 32). Scales(block, scale, min): one per group; min only
// where kMin.
struct FormatQ8_0 {
  using Block = BlockQ8_0;
  static constexpr DType kType = DType::kQ8_0;
  static constexpr int kBits = 8, kGroup = 32, kOffset = 128;
  static constexpr bool kMin = false;
  static void Levels(const Block& block, int, uint8_t* out) {
    for (int i = 0; i < 32; ++i) out[i] = static_cast<uint8_t>(block.q[i] + 128);
  }
  static void Scales(const Block& block, float* scale, float*) { *scale = HalfToFloat(block.d); }
};

struct FormatQ4_0 {
  using Block = BlockQ4_0;
  static constexpr DType kType = DType::kQ4_0;
  static constexpr int kBits = 4, kGroup = 32, kOffset = 8;
  static constexpr bool kMin = false;
  static void Levels(const Block& block, int, uint8_t* out) {
    for (int i = 0; i < 16; ++i) {
      out[i] = block.q[i] & 15;
      out[i + 16] = block.q[i] >> 4;
    }
  }
  static void Scales(const Block& block, float* scale, float*) { *scale = HalfToFloat(block.d); }
};

struct FormatQ5_0 {
  using Block = BlockQ5_0;
  static constexpr DType kType = DType::kQ5_0;
  static constexpr int kBits = 5, kGroup = 32, kOffset = 16;
  static constexpr bool kMin = false;
  static void Levels(const Block& block, int, uint8_t* out) {
    uint32_t high;
    std::memcpy(&high, block.high, 4);
    for (int i = 0; i < 16; ++i) {
      out[i] = (block.q[i] & 15) | (high >> i & 1) << 4;
      out[i + 16] = (block.q[i] >> 4) | (high >> (i + 16) & 1) << 4;
    }
  }
  static void Scales(const Block& block, float* scale, float*) { *scale = HalfToFloat(block.d); }
};

// Scales and mins of Q4_K and Q5_K.
template <class Block>
void ScalesWithMins(const Block& block, float* scale, float* min) {
  uint8_t scales[8], mins[8];
  SixBitPairs(block.scales, scales, mins);
  const float d = HalfToFloat(block.d);
  const float dmin = HalfToFloat(block.dmin);
  for (int g = 0; g < 8; ++g) {
    scale[g] = d * scales[g];
    min[g] = dmin * mins[g];
  }
}

struct FormatQ4_K {
  using Block = BlockQ4_K;
  static constexpr DType kType = DType::kQ4_K;
  static constexpr int kBits = 4, kGroup = 32, kOffset = 0;
  static constexpr bool kMin = true;
  static void Levels(const Block& block, int run, uint8_t* out) {
    const uint8_t* q = block.q + 32 * (run / 2);
    for (int i = 0; i < 32; ++i) out[i] = q[i] >> 4 * (run % 2) & 15;
  }
  static void Scales(const Block& block, float* scale, float* min) {
    ScalesWithMins(block, scale, min);
  }
};

struct FormatQ5_K {
  using Block = BlockQ5_K;
  static constexpr DType kType = DType::kQ5_K;
  static constexpr int kBits = 5, kGroup = 32, kOffset = 0;
  static constexpr bool kMin = true;
  static void Levels(const Block& block, int run, uint8_t* out) {
    const uint8_t* q = block.q + 32 * (run / 2);
    for (int i = 0; i < 32; ++i) {
      out[i] = (q[i] >> 4 * (run % 2) & 15) | (block.high[i] >> run & 1) << 4;
    }
  }
  static void Scales(const Block& block, float* scale, float* min) {
    ScalesWithMins(block, scale, min);
  }
};

struct FormatQ6_K {
  using Block = BlockQ6_K;
  static constexpr DType kType = DType::kQ6_K;
  static constexpr int kBits = 6, kGroup = 16, kOffset = 32;
  static constexpr bool kMin = false;
  static void Levels(const Block& block, int run, uint8_t* out) {
    const int half = run / 4, quarter = run % 4;
    const uint8_t* low = block.low + 64 * half + 32 * (quarter % 2);
    const uint8_t* high = block.high + 32 * half;
    for (int i = 0; i < 32; ++i) {
      out[i] = (low[i] >> 4 * (quarter / 2) & 15) | (high[i] >> 2 * quarter & 3) << 4;
    }
  }
  static void Scales(const Block& block, float* scale, float*) {
    const float d = HalfToFloat(block.d);
    for (int g = 0; g < 16; ++g) scale[g] = d * block.scales[g];
  }
};

// Calls visit(Format{}) for a quantised type and returns true, or false for any other type.
template <class Visit>
bool VisitFormat(DType type, Visit&& visit) {
  switch (type) {
    case DType::kQ8_0:
      visit(FormatQ8_0{});
      return true;
    case DType::kQ4_0:
      visit(FormatQ4_0{});
      return true;
    case DType::kQ5_0:
      visit(FormatQ5_0{});
      return true;
    case DType::kQ4_K:
      visit(FormatQ4_K{});
      return true;
    case DType::kQ5_K:
      visit(FormatQ5_K{});
      return true;
    case DType::kQ6_K:
      visit(FormatQ6_K{});
      return true;
    default:
      return false;
  }
}

// out[i] = element i of a row of any weight type; `elements` is a multiple of the type's block.
void DequantiseRow(DType type, const std::byte* row, int64_t elements, float* out);

}  // namespace longspan
