#pragma once
// Element types of activations, caches and weights. Quantised types are rows of blocks, laid out
// byte for byte as GGUF stores them, so that a mapped file is a matrix. std only: nvcc compiles
// this.
#include <cstddef>
#include <cstdint>

namespace longspan {

enum class DType : uint8_t {
  kF32,
  kF16,
  kBF16,
  kI32,
  // Activations as a backend's products of block weights take them: 8-bit integers in groups of 32,
  // with what it keeps beside them. Whole unstrided rows, made by one op and read by the product
  // after it, which has the same rows; opaque to all others, in no more bytes than F32.
  kI8,
  kQ8_0,
  kQ4_0,
  kQ5_0,
  kQ4_K,
  kQ5_K,
  kQ6_K,
};
inline constexpr DType kBlockTypes[] = {DType::kQ8_0, DType::kQ4_0, DType::kQ5_0,
                                        DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

struct DTypeInfo {
  const char* name;
  int block_elements;  // 1 for plain types
  int block_bytes;
};

constexpr DTypeInfo Info(DType type) {
  switch (type) {
    case DType::kF32:
      return {"F32", 1, 4};
    case DType::kF16:
      return {"F16", 1, 2};
    case DType::kBF16:
      return {"BF16", 1, 2};
    case DType::kI32:
      return {"I32", 1, 4};
    case DType::kI8:
      return {"I8", 1, 4};
    case DType::kQ8_0:
      return {"Q8_0", 32, 34};
    case DType::kQ4_0:
      return {"Q4_0", 32, 18};
    case DType::kQ5_0:
      return {"Q5_0", 32, 22};
    case DType::kQ4_K:
      return {"Q4_K", 256, 144};
    case DType::kQ5_K:
      return {"Q5_K", 256, 176};
    case DType::kQ6_K:
      return {"Q6_K", 256, 210};
  }
  return {"?", 1, 0};
}

// Bytes of `elements` consecutive elements; elements is a multiple of the block.
constexpr int64_t BytesOf(DType type, int64_t elements) {
  return elements / Info(type).block_elements * Info(type).block_bytes;
}

constexpr bool IsQuantised(DType type) { return Info(type).block_elements > 1; }

}  // namespace longspan
