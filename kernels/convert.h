#pragma once
// 16-bit floats to F32 and back, one number at a time. std only.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/dtype.h"

namespace longspan {

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float FromBf16(uint16_t half) { return BitsToFloat(static_cast<uint32_t>(half) << 16); }

// Round to nearest even; a NaN stays one.
inline uint16_t ToBf16(float value) {
  const uint32_t bits = FloatToBits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Round to nearest even; a NaN stays one.
inline uint16_t ToF16(float value) {
  const uint32_t bits = FloatToBits(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 in units of 2^-24, which are those of a float from 0.5 to 1.
    return sign | static_cast<uint16_t>(FloatToBits(BitsToFloat(magnitude) + 0.5f) - 0x3f000000u);
  }
  const uint32_t rebiased = magnitude - 0x38000000u;  // from a bias of 127 to 15
  return sign | static_cast<uint16_t>((rebiased + 0xfffu + (rebiased >> 13 & 1u)) >> 13);
}

inline float FromF16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign != 0 ? -tiny : tiny;
  }
  if (exponent == 31) return BitsToFloat(sign | 0x7f800000u | (mantissa << 13));
  return BitsToFloat(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// `count` elements of a plain float type as F32; false for any other type.
inline bool ToFloat(DType dtype, const std::byte* from, size_t count, float* to) {
  for (size_t i = 0; i < count; ++i) {
    uint16_t half = 0;
    switch (dtype) {
      case DType::kF32:
        std::memcpy(to + i, from + 4 * i, 4);
        break;
      case DType::kF16:
        std::memcpy(&half, from + 2 * i, 2);
        to[i] = FromF16(half);
        break;
      case DType::kBF16:
        std::memcpy(&half, from + 2 * i, 2);
        to[i] = FromBf16(half);
        break;
      default:
        return false;
    }
  }
  return true;
}

}  // namespace longspan
