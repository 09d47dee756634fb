#pragma once
// Weight blocks as GGUF stores them, on the device. The layouts are those of kernels/cpu/blocks.h.
//
// Two ways to read them. Element(): any one element as F32. And pieces, for the dot products:
// kParts lanes share a block; Load() gives one of them kWords words of four levels as signed bytes,
// and for each run of kWords / kScales words a scale and a min, so that
//   value = scale * level - min;
// word w holds elements [At(part, w), At(part, w) + 4), and a run never leaves a group of 32.
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/dtype.h"

namespace longspan::cuda {

__device__ __forceinline__ float HalfAt(const uint8_t* p) {
  return __half2float(__ushort_as_half(*reinterpret_cast<const uint16_t*>(p)));
}

// Four bytes at an even address.
__device__ __forceinline__ uint32_t WordAt(const uint8_t* p) {
  const auto* half = reinterpret_cast<const uint16_t*>(p);
  return __ldg(half) | static_cast<uint32_t>(__ldg(half + 1)) << 16;
}

// Each byte of `levels`, below 128, minus the byte repeated in `offset`, at most 128.
__device__ __forceinline__ int Minus(uint32_t levels, uint32_t offset) {
  return static_cast<int>(((levels | 0x80808080u) - offset) ^ 0x80808080u);
}

// Spreads bits 0 to 3 to bit 4 of bytes 0 to 3.
__device__ __forceinline__ uint32_t FifthBits(uint32_t bits) {
  return (bits << 4 & 0x10u) | (bits << 11 & 0x1000u) | (bits << 18 & 0x100000u) |
         (bits << 25 & 0x10000000u);
}

// Scale and min `group` of 8 in the 12 packed bytes of Q4_K and Q5_K.
__device__ __forceinline__ void SixBitPair(const uint8_t* packed, int group, int* scale, int* min) {
  if (group < 4) {
    *scale = packed[group] & 63;
    *min = packed[group + 4] & 63;
  } else {
    *scale = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4;
    *min = packed[group + 4] >> 4 | (packed[group] >> 6) << 4;
  }
}

struct BlocksQ8_0 {
  static constexpr DType kType = DType::kQ8_0;
  static constexpr int kElements = 32, kBytes = 34, kParts = 8, kWords = 1, kScales = 1;
  static constexpr bool kMin = false;
  static __device__ float Element(const uint8_t* block, int i) {
    return HalfAt(block) * static_cast<int8_t>(block[2 + i]);
  }
  static __device__ int At(int part, int) { return 4 * part; }
  static __device__ void Load(const uint8_t* block, int part, int* words, float* scale, float*) {
    words[0] = static_cast<int>(WordAt(block + 2 + 4 * part));
    scale[0] = HalfAt(block);
  }
};

struct BlocksQ4_0 {
  static constexpr DType kType = DType::kQ4_0;
  static constexpr int kElements = 32, kBytes = 18, kParts = 4, kWords = 2, kScales = 1;
  static constexpr bool kMin = false;
  static __device__ float Element(const uint8_t* block, int i) {
    return HalfAt(block) * ((block[2 + i % 16] >> 4 * (i / 16) & 15) - 8);
  }
  static __device__ int At(int part, int word) { return 4 * part + 16 * word; }
  static __device__ void Load(const uint8_t* block, int part, int* words, float* scale, float*) {
    const uint32_t q = WordAt(block + 2 + 4 * part);
    words[0] = Minus(q & 0x0f0f0f0fu, 0x08080808u);
    words[1] = Minus(q >> 4 & 0x0f0f0f0fu, 0x08080808u);
    scale[0] = HalfAt(block);
  }
};

struct BlocksQ5_0 {
  static constexpr DType kType = DType::kQ5_0;
  static constexpr int kElements = 32, kBytes = 22, kParts = 4, kWords = 2, kScales = 1;
  static constexpr bool kMin = false;
  static __device__ float Element(const uint8_t* block, int i) {
    const int high = block[2 + i / 8] >> i % 8 & 1;
    return HalfAt(block) * (((block[6 + i % 16] >> 4 * (i / 16) & 15) | high << 4) - 16);
  }
  static __device__ int At(int part, int word) { return 4 * part + 16 * word; }
  static __device__ void Load(const uint8_t* block, int part, int* words, float* scale, float*) {
    const uint32_t q = WordAt(block + 6 + 4 * part);
    const uint32_t high = WordAt(block + 2) >> 4 * part;
    words[0] = Minus((q & 0x0f0f0f0fu) | FifthBits(high & 15), 0x10101010u);
    words[1] = Minus((q >> 4 & 0x0f0f0f0fu) | FifthBits(high >> 16 & 15), 0x10101010u);
    scale[0] = HalfAt(block);
  }
};

// Of each 64 elements, 32 bytes hold the first 32 (low) and the last 32 (high): a part's 16 bytes
// are 16 elements of one group and 16 of the next.
struct BlocksQ4_K {
  static constexpr DType kType = DType::kQ4_K;
  static constexpr int kElements = 256, kBytes = 144, kParts = 8, kWords = 8, kScales = 2;
  static constexpr bool kMin = true;
  static __device__ float Element(const uint8_t* block, int i) {
    int scale, min;
    SixBitPair(block + 4, i / 32, &scale, &min);
    const int q = block[16 + i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15;
    return HalfAt(block) * scale * q - HalfAt(block + 2) * min;
  }
  static __device__ int At(int part, int word) {
    return 64 * (part / 2) + 16 * (part % 2) + 32 * (word / 4) + 4 * (word % 4);
  }
  static __device__ void Scales(const uint8_t* block, int part, float* scale, float* min) {
    const float d = HalfAt(block), dmin = HalfAt(block + 2);
    for (int r = 0; r < 2; ++r) {
      int s, m;
      SixBitPair(block + 4, part / 2 * 2 + r, &s, &m);
      scale[r] = d * s;
      min[r] = dmin * m;
    }
  }
  static __device__ void Load(const uint8_t* block, int part, int* words, float* scale,
                              float* min) {
    const uint4 q = __ldg(reinterpret_cast<const uint4*>(block + 16) + part);
    const uint32_t bytes[4] = {q.x, q.y, q.z, q.w};
    for (int w = 0; w < 4; ++w) {
      words[w] = static_cast<int>(bytes[w] & 0x0f0f0f0fu);
      words[w + 4] = static_cast<int>(bytes[w] >> 4 & 0x0f0f0f0fu);
    }
    Scales(block, part, scale, min);
  }
};

// Q4_K with a fifth bit: bit g of high[i] belongs to element i of group g.
struct BlocksQ5_K {
  static constexpr DType kType = DType::kQ5_K;
  static constexpr int kElements = 256, kBytes = 176, kParts = 8, kWords = 8, kScales = 2;
  static constexpr bool kMin = true;
  static __device__ float Element(const uint8_t* block, int i) {
    int scale, min;
    SixBitPair(block + 4, i / 32, &scale, &min);
    const int q = (block[48 + i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15) |
                  (block[16 + i % 32] >> i / 32 & 1) << 4;
    return HalfAt(block) * scale * q - HalfAt(block + 2) * min;
  }
  static __device__ int At(int part, int word) { return BlocksQ4_K::At(part, word); }
  static __device__ void Load(const uint8_t* block, int part, int* words, float* scale,
                              float* min) {
    const uint4 q = __ldg(reinterpret_cast<const uint4*>(block + 48) + part);
    const uint4 h = __ldg(reinterpret_cast<const uint4*>(block + 16) + part % 2);
    const uint32_t bytes[4] = {q.x, q.y, q.z, q.w};
    const uint32_t high[4] = {h.x, h.y, h.z, h.w};
    const int group = part / 2 * 2;
    for (int w = 0; w < 4; ++w) {
      const uint32_t bits = high[w] >> group;
      words[w] = static_cast<int>((bytes[w] & 0x0f0f0f0fu) | (bits & 0x01010101u) << 4);
      words[w + 4] = static_cast<int>((bytes[w] >> 4 & 0x0f0f0f0fu) | (bits & 0x02020202u) << 3);
    }
    BlocksQ4_K::Scales(block, part, scale, min);
  }
};

// Each half of 128 elements is four runs of 32: see BlockQ6_K. A part holds 4 elements of each run
// of one half.
struct BlocksQ6_K {
  static constexpr DType kType = DType::kQ6_K;
  static constexpr int kElements = 256, kBytes = 210, kParts = 16, kWords = 4, kScales = 4;
  static constexpr bool kMin = false;
  static __device__ float Element(const uint8_t* block, int i) {
    const int half = i / 128, run = i / 32 % 4, lane = i % 32;
    const int low = block[64 * half + 32 * (run % 2) + lane] >> 4 * (run / 2) & 15;
    const int high = block[128 + 32 * half + lane] >> 2 * run & 3;
    return HalfAt(block + 208) * static_cast<int8_t>(block[192 + i / 16]) *
           ((low | high << 4) - 32);
  }
  static __device__ int At(int part, int word) {
    return 128 * (part / 8) + 32 * word + 4 * (part % 8);
  }
  static __device__ void Load(const uint8_t* block, int part, int* words, float* scale, float*) {
    const int half = part / 8, at = 4 * (part % 8);
    const uint32_t low0 = WordAt(block + 64 * half + at);
    const uint32_t low1 = WordAt(block + 64 * half + 32 + at);
    const uint32_t high = WordAt(block + 128 + 32 * half + at);
    const float d = HalfAt(block + 208);
    for (int run = 0; run < 4; ++run) {
      const uint32_t low = (run % 2 == 0 ? low0 : low1) >> 4 * (run / 2) & 0x0f0f0f0fu;
      words[run] = Minus(low | (high >> 2 * run & 0x03030303u) << 4, 0x20202020u);
      scale[run] = d * static_cast<int8_t>(block[192 + 8 * half + 2 * run + at / 16]);
    }
  }
};

// Plain types in the form that Element() has.
template <class T, DType kPlain>
struct Plain {
  static constexpr DType kType = kPlain;
  static constexpr int kElements = 1, kBytes = sizeof(T);
  static __device__ float Element(const uint8_t* block, int) {
    return static_cast<float>(*reinterpret_cast<const T*>(block));
  }
};

// Calls visit(Blocks{}) for a quantised type; false for any other.
template <class Visit>
bool VisitBlocks(DType type, Visit&& visit) {
  switch (type) {
    case DType::kQ8_0:
      visit(BlocksQ8_0{});
      return true;
    case DType::kQ4_0:
      visit(BlocksQ4_0{});
      return true;
    case DType::kQ5_0:
      visit(BlocksQ5_0{});
      return true;
    case DType::kQ4_K:
      visit(BlocksQ4_K{});
      return true;
    case DType::kQ5_K:
      visit(BlocksQ5_K{});
      return true;
    case DType::kQ6_K:
      visit(BlocksQ6_K{});
      return true;
    default:
      return false;
  }
}

}  // namespace longspan::cuda
