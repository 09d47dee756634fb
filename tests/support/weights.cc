#include "tests/support/weights.h"

#include <cmath>
#include <cstring>

#include "kernels/convert.h"

namespace longspan::testing {
namespace {

uint16_t U16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }

double DecodeBrain(uint16_t bits) {
  const int exponent = bits >> 7 & 255;
  const double fraction = bits & 127;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -133) : std::ldexp(128 + fraction, exponent - 134);
  return bits >> 15 ? -magnitude : magnitude;
}

double DecodeSingle(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return value;
}

// K types keep the scale and min of group j of 8 in 12 bytes.
void ScaleAndMin(const uint8_t* packed, int j, int* scale, int* min) {
  if (j < 4) {
    *scale = packed[j] % 64;
    *min = packed[j + 4] % 64;
  } else {
    *scale = packed[j + 4] % 16 + packed[j - 4] / 64 * 16;
    *min = packed[j + 4] / 16 + packed[j] / 64 * 16;
  }
}

int Bit(const uint8_t* bytes, int bit) { return bytes[bit / 8] >> bit % 8 & 1; }

double DecodeQ4K(const uint8_t* b, int i) {
  int scale, min;
  ScaleAndMin(b + 4, i / 32, &scale, &min);
  const int byte = b[16 + i / 64 * 32 + i % 32];
  const int q = i / 32 % 2 == 0 ? byte % 16 : byte / 16;
  return DecodeHalf(U16(b)) * scale * q - DecodeHalf(U16(b + 2)) * min;
}

double DecodeQ5K(const uint8_t* b, int i) {
  int scale, min;
  ScaleAndMin(b + 4, i / 32, &scale, &min);
  const int byte = b[48 + i / 64 * 32 + i % 32];
  const int q = (i / 32 % 2 == 0 ? byte % 16 : byte / 16) + 16 * Bit(b + 16 + i % 32, i / 32);
  return DecodeHalf(U16(b)) * scale * q - DecodeHalf(U16(b + 2)) * min;
}

double DecodeQ6K(const uint8_t* b, int i) {
  const int half = i / 128, run = i % 128 / 32, lane = i % 32;
  const int low_byte = b[64 * half + (run % 2) * 32 + lane];
  const int low = run < 2 ? low_byte % 16 : low_byte / 16;
  const int high = b[128 + 32 * half + lane] >> 2 * run & 3;
  const int scale = static_cast<int8_t>(b[192 + i / 16]);
  return DecodeHalf(U16(b + 208)) * scale * (low + 16 * high - 32);
}

// Where a block's F16 scales are.
std::vector<int> ScaleOffsets(DType type) {
  switch (type) {
    case DType::kQ8_0:
    case DType::kQ4_0:
    case DType::kQ5_0:
      return {0};
    case DType::kQ4_K:
    case DType::kQ5_K:
      return {0, 2};
    case DType::kQ6_K:
      return {208};
    default:
      return {};
  }
}

}  // namespace

View Place(Backend& backend, const View& matrix, std::byte* to) {
  if (backend.WeightBytes(matrix) > 0) return backend.PlaceWeights(matrix, to);
  backend.CopyIn(to, matrix.data, matrix.bytes());
  View placed = matrix;
  placed.data = to;
  return placed;
}

double DecodeHalf(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const double fraction = half & 1023;
  const double magnitude =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return half >> 15 ? -magnitude : magnitude;
}

double DecodeElement(DType type, const uint8_t* row, int64_t index) {
  const uint8_t* b = row + index / Info(type).block_elements * Info(type).block_bytes;
  const int i = static_cast<int>(index % Info(type).block_elements);
  switch (type) {
    case DType::kF32:
      return DecodeSingle(b);
    case DType::kF16:
      return DecodeHalf(U16(b));
    case DType::kBF16:
      return DecodeBrain(U16(b));
    case DType::kQ8_0:
      return DecodeHalf(U16(b)) * static_cast<int8_t>(b[2 + i]);
    case DType::kQ4_0: {
      const int q = i < 16 ? b[2 + i] % 16 : b[2 + i - 16] / 16;
      return DecodeHalf(U16(b)) * (q - 8);
    }
    case DType::kQ5_0: {
      const int q = i < 16 ? b[6 + i] % 16 : b[6 + i - 16] / 16;
      return DecodeHalf(U16(b)) * (q + 16 * Bit(b + 2, i) - 16);
    }
    case DType::kQ4_K:
      return DecodeQ4K(b, i);
    case DType::kQ5_K:
      return DecodeQ5K(b, i);
    case DType::kQ6_K:
      return DecodeQ6K(b, i);
    case DType::kI32:
    case DType::kI8:
      break;
  }
  return NAN;
}

std::vector<double> DecodeRow(const Weights& weights, int64_t row) {
  const uint8_t* bytes = weights.bytes.data() + BytesOf(weights.type, row * weights.columns);
  std::vector<double> values(weights.columns);
  for (int64_t i = 0; i < weights.columns; ++i) {
    values[i] = DecodeElement(weights.type, bytes, i);
  }
  return values;
}

uint16_t EncodeHalf(double value) {
  if (value == 0) return 0;
  int exponent;
  std::frexp(value, &exponent);                   // below 2^exponent
  const int unit = std::max(exponent - 11, -24);  // of the last of eleven bits
  return static_cast<uint16_t>((unit + 24) * 1024 + std::nearbyint(std::ldexp(value, -unit)));
}

std::vector<uint8_t> Encode(DType type, const std::vector<float>& values) {
  const int elements = Info(type).block_elements, bytes = Info(type).block_bytes;
  std::vector<uint8_t> encoded(BytesOf(type, static_cast<int64_t>(values.size())));
  uint8_t* to = encoded.data();
  for (auto x = values.begin(); x != values.end(); x += elements, to += bytes) {
    if (type == DType::kF32) {
      std::memcpy(to, &*x, 4);
    } else if (type == DType::kBF16) {
      const uint16_t half = ToBf16(*x);  // proven in blocks_test.cc
      std::memcpy(to, &half, 2);
    } else {
      CHECK(type == DType::kQ8_0) << Info(type).name;
      double largest = 0;
      for (int i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(double{x[i]}));
      const uint16_t scale = EncodeHalf(largest / 127);
      std::memcpy(to, &scale, 2);
      for (int i = 0; i < 32; ++i) {
        const double level = largest == 0 ? 0 : std::nearbyint(x[i] * 127 / largest);
        to[2 + i] = static_cast<uint8_t>(static_cast<int>(level));
      }
    }
  }
  return encoded;
}

Weights RandomWeights(DType type, int64_t rows, int64_t columns, std::mt19937& random) {
  Weights w{type, rows, columns, std::vector<uint8_t>(BytesOf(type, rows * columns))};
  if (type == DType::kF32) {
    const std::vector<float> values = RandomFloats(rows * columns, random);
    std::memcpy(w.bytes.data(), values.data(), w.bytes.size());
    return w;
  }
  for (uint8_t& byte : w.bytes) byte = static_cast<uint8_t>(random());
  const int step = Info(type).block_bytes;
  for (size_t b = 0; b < w.bytes.size(); b += step) {
    if (type == DType::kF16) w.bytes[b + 1] = (w.bytes[b + 1] & 0x83) | 0x38;   // 0.5 to 2
    if (type == DType::kBF16) w.bytes[b + 1] = (w.bytes[b + 1] & 0x80) | 0x3f;  // 0.5 to 2
    for (int offset : ScaleOffsets(type)) {
      w.bytes[b + offset + 1] = 0x20 | (w.bytes[b + offset + 1] & 0x07);  // 2^-7 to 2^-5
    }
  }
  return w;
}

std::vector<float> RandomFloats(int64_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace longspan::testing
