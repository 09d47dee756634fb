#pragma once
// Weight blocks of GGUF's types on the device. What a block's bytes mean is in
// kernels/cpu/blocks.h; here they lie in strips (PackStrips): the blocks of kStripRows weight rows
// at one place along the rows, byte next to byte as the lanes of a warp take them, then those at
// the next place.
//
// Format::At(row, byte) tells where in 16 blocks a byte of one lies. Element() decodes one element.
// A block has kUnits units of kGroups groups of 32 elements, whose values are
//   scale * level - min.
// LoadWords() gives a warp what its product of bytes on the tensor cores takes of a unit: lane l
// has two words of four levels as signed bytes for each group and for the rows l / 4 and l / 4 + 8.
// The words of part p = l % 4 are elements [WordAt(p, w), WordAt(p, w) + 4) of group Group(unit, g)
// of the block. LoadScales() gives a unit's scales and mins of one row; where a group has two
// scales, each is of 16 elements, and word w's.
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/tensor_cores.cuh"
#include "kernels/dtype.h"

namespace longspan::cuda {

constexpr int kStripRows = 16;

__device__ __forceinline__ float ToHalf(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// Where a strip is found: in memory that no kernel writes meanwhile, or in shared memory.
// Read() gives element `index` of those that begin at `byte`; of one number compilers make slower
// addresses.
struct InMemory {
  const uint8_t* strip;
  template <class T>
  __device__ __forceinline__ T Read(int byte, int index) const {
    return __ldg(reinterpret_cast<const T*>(strip + byte) + index);
  }
};
struct InShared {
  uint32_t strip;
  template <class T>
  __device__ __forceinline__ T Read(int byte, int index) const {
    return LoadShared<T>(strip + byte + index * int{sizeof(T)});
  }
};

// One block in its strip, byte by byte.
template <class Format>
struct Block {
  const uint8_t* strip;  // of the 16 blocks
  int row;
  __device__ int operator[](int byte) const { return strip[Format::At(row, byte)]; }
  __device__ int Signed(int byte) const { return static_cast<int8_t>((*this)[byte]); }
  __device__ float Half(int byte) const { return ToHalf((*this)[byte] | (*this)[byte + 1] << 8); }
};

// Each byte of `levels`, below 128, minus the byte repeated in `offset`, at most 128.
__device__ __forceinline__ int Minus(uint32_t levels, uint32_t offset) {
  return static_cast<int>(((levels | 0x80808080u) - offset) ^ 0x80808080u);
}

// Spreads bits 0 to 3, all that there are, to bit 4 of bytes 0 to 3: a copy of them for each.
__device__ __forceinline__ uint32_t FifthBits(uint32_t bits) {
  return bits * 0x02040810u & 0x10101010u;
}

template <int kGroupCount, int kScaleCount>
struct UnitOf {
  static constexpr int kGroups = kGroupCount, kScales = kScaleCount;
  int words[kGroups][2];
  float scale[kGroups][kScales];
  float min[kGroups];  // 0 where the format has none
};

// Lanes' shares side by side, each word by word, the lower row's first, as a product takes them:
// where byte `byte` of the kBytes of a row's share lies.
template <int kBytes>
__host__ __device__ constexpr int Interleaved(int row, int part, int byte) {
  return 2 * kBytes * (row % 8 * 4 + part) + byte / 4 * 8 + 4 * (row / 8) + byte % 4;
}

// Where word `w` of part `part` begins in a group.
template <class Format>
__device__ __forceinline__ int WordAt(int part, int w) {
  return Format::kAdjacent ? 8 * part + 4 * w : 4 * part + 16 * w;
}

// Where a strip begins with a scale, F16, of each row: that, and the only one of a unit.
template <class Strip>
__device__ __forceinline__ float ScaleOf(Strip strip, int row) {
  return ToHalf(strip.template Read<uint16_t>(0, row));
}
template <class Strip>
__device__ __forceinline__ void LoadScale(Strip strip, int row, UnitOf<1, 1>* of) {
  of->scale[0][0] = ScaleOf(strip, row);
  of->min[0] = 0;
}

// In a strip: scales; words.
struct BlocksQ8_0 {
  static constexpr DType kType = DType::kQ8_0;
  static constexpr int kElements = 32, kBytes = 34, kUnits = 1;
  static constexpr bool kMin = false, kAdjacent = true;
  using Unit = UnitOf<1, 1>;
  static __device__ int At(int row, int byte) {
    if (byte < 2) return 2 * row + byte;
    return 32 + Interleaved<8>(row, (byte - 2) / 8, (byte - 2) % 8);
  }
  static __device__ float Element(const Block<BlocksQ8_0>& block, int i) {
    return block.Half(0) * block.Signed(2 + i);
  }
  static __device__ int Group(int, int) { return 0; }
  template <class Strip>
  static __device__ void LoadWords(Strip strip, int, int lane, Unit* rows) {
    const uint4 q = strip.template Read<uint4>(32, lane);
    const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r].words[0][0] = static_cast<int>(words[r]);
      rows[r].words[0][1] = static_cast<int>(words[2 + r]);
    }
  }
  template <class Strip>
  static __device__ void LoadScales(Strip strip, int, int row, Unit* of) {
    LoadScale(strip, row, of);
  }
};

// In a strip: scales; words, whose low bits are elements 0 to 15 of a block.
struct BlocksQ4_0 {
  static constexpr DType kType = DType::kQ4_0;
  static constexpr int kElements = 32, kBytes = 18, kUnits = 1;
  static constexpr bool kMin = false, kAdjacent = false;
  using Unit = UnitOf<1, 1>;
  static __device__ int At(int row, int byte) {
    if (byte < 2) return 2 * row + byte;
    return 32 + Interleaved<4>(row, (byte - 2) / 4, (byte - 2) % 4);
  }
  static __device__ float Element(const Block<BlocksQ4_0>& block, int i) {
    return block.Half(0) * ((block[2 + i % 16] >> 4 * (i / 16) & 15) - 8);
  }
  static __device__ int Group(int, int) { return 0; }
  template <class Strip>
  static __device__ void LoadWords(Strip strip, int, int lane, Unit* rows) {
    const uint2 q = strip.template Read<uint2>(32, lane);
    const uint32_t words[2] = {q.x, q.y};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows[r].words[0][0] = Minus(words[r] & 0x0f0f0f0fu, 0x08080808u);
      rows[r].words[0][1] = Minus(words[r] >> 4 & 0x0f0f0f0fu, 0x08080808u);
    }
  }
  template <class Strip>
  static __device__ void LoadScales(Strip strip, int, int row, Unit* of) {
    LoadScale(strip, row, of);
  }
};

// In a strip: scales; fifth bits, a word for each row; words as of Q4_0.
struct BlocksQ5_0 {
  static constexpr DType kType = DType::kQ5_0;
  static constexpr int kElements = 32, kBytes = 22, kUnits = 1;
  static constexpr bool kMin = false, kAdjacent = false;
  using Unit = UnitOf<1, 1>;
  static __device__ int At(int row, int byte) {
    if (byte < 2) return 2 * row + byte;
    if (byte < 6) return 32 + 4 * row + byte - 2;
    return 96 + Interleaved<4>(row, (byte - 6) / 4, (byte - 6) % 4);
  }
  static __device__ float Element(const Block<BlocksQ5_0>& block, int i) {
    const int high = block[2 + i / 8] >> i % 8 & 1;
    return block.Half(0) * (((block[6 + i % 16] >> 4 * (i / 16) & 15) | high << 4) - 16);
  }
  static __device__ int Group(int, int) { return 0; }
  template <class Strip>
  static __device__ void LoadWords(Strip strip, int, int lane, Unit* rows) {
    const uint2 q = strip.template Read<uint2>(96, lane);
    const uint32_t words[2] = {q.x, q.y};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane / 4 + 8 * r;
      const uint32_t high = strip.template Read<uint32_t>(32, row) >> 4 * (lane % 4);
      rows[r].words[0][0] = Minus((words[r] & 0x0f0f0f0fu) | FifthBits(high & 15), 0x10101010u);
      rows[r].words[0][1] =
          Minus((words[r] >> 4 & 0x0f0f0f0fu) | FifthBits(high >> 16 & 15), 0x10101010u);
    }
  }
  template <class Strip>
  static __device__ void LoadScales(Strip strip, int, int row, Unit* of) {
    LoadScale(strip, row, of);
  }
};

// factor * byte `at` of `bytes`, rounded once: as the last bits of 2^23 it is a float, and what
// 2^23 adds to the product is exact for a factor of 11 bits.
__device__ __forceinline__ float TimesByte(float factor, uint32_t bytes, int at) {
  constexpr float k2To23 = 8388608.0f;
  const uint32_t number = __byte_perm(bytes, __float_as_uint(k2To23), 0x7540 | at);
  return fmaf(factor, __uint_as_float(number), -k2To23 * factor);
}

// The 16 bytes that Q4_K and Q5_K begin with: two F16, then eight scales and mins of 6 bits, in
// twelve bytes: of groups 0 to 3 in one byte each, first scales, then mins; of the others the low
// four bits in one of the last four bytes, the high two above those of the first.
struct Header {
  // Both groups' of a unit.
  template <class Strip, class Unit>
  static __device__ __forceinline__ void Load(Strip strip, int unit, int row, Unit* of) {
    const uint4 bytes = strip.template Read<uint4>(0, row);
    const int shift = unit % 2 * 16, high = unit < 2 ? 0 : 2;
    const uint32_t low_bits = unit < 2 ? 0 : 0x0f0f;
    const uint32_t c = bytes.w >> shift;
    const auto Six = [&](uint32_t whole, uint32_t halves) {
      return ((whole >> (shift + high) & ~low_bits) | (halves & low_bits)) & 0x3f3fu;
    };
    const uint32_t scales = Six(bytes.y, c), mins = Six(bytes.z, c >> 4);
    const float d = ToHalf(bytes.x & 0xffff), dmin = ToHalf(bytes.x >> 16);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      of->scale[g][0] = TimesByte(d, scales, g);
      of->min[g] = TimesByte(dmin, mins, g);
    }
  }
  // Scale and min `group` of 8.
  template <class Format>
  static __device__ void Pair(const Block<Format>& block, int group, int* scale, int* min) {
    if (group < 4) {
      *scale = block[4 + group] & 63;
      *min = block[8 + group] & 63;
    } else {
      *scale = (block[8 + group] & 15) | (block[group] >> 6) << 4;
      *min = block[8 + group] >> 4 | (block[4 + group] >> 6) << 4;
    }
  }
};

// Of each 64 elements, a unit, 32 bytes hold the first 32 (low) and the last 32 (high). In a strip:
// headers; units' words.
struct BlocksQ4_K {
  static constexpr DType kType = DType::kQ4_K;
  static constexpr int kElements = 256, kBytes = 144, kUnits = 4;
  static constexpr bool kMin = true, kAdjacent = true;
  using Unit = UnitOf<2, 1>;
  static __device__ int At(int row, int byte) {
    if (byte < 16) return 16 * row + byte;
    const int unit = (byte - 16) / 32, in_unit = (byte - 16) % 32;
    return 256 + 512 * unit + Interleaved<8>(row, in_unit / 8, in_unit % 8);
  }
  static __device__ float Element(const Block<BlocksQ4_K>& block, int i) {
    int scale, min;
    Header::Pair(block, i / 32, &scale, &min);
    const int q = block[16 + i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15;
    return block.Half(0) * scale * q - block.Half(2) * min;
  }
  static __device__ int Group(int unit, int g) { return 2 * unit + g; }
  template <class Strip>
  static __device__ void LoadWords(Strip strip, int unit, int lane, Unit* rows) {
    const uint4 q = strip.template Read<uint4>(256 + 512 * unit, lane);
    const uint32_t words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        rows[r].words[0][w] = static_cast<int>(words[2 * w + r] & 0x0f0f0f0fu);
        rows[r].words[1][w] = static_cast<int>(words[2 * w + r] >> 4 & 0x0f0f0f0fu);
      }
    }
  }
  template <class Strip>
  static __device__ void LoadScales(Strip strip, int unit, int row, Unit* of) {
    Header::Load(strip, unit, row, of);
  }
};

// Q4_K with a fifth bit: bit g of high[i] belongs to element i of group g. In a strip: headers;
// fifth bits as words; units' words.
struct BlocksQ5_K {
  static constexpr DType kType = DType::kQ5_K;
  static constexpr int kElements = 256, kBytes = 176, kUnits = 4;
  static constexpr bool kMin = true, kAdjacent = true;
  using Unit = UnitOf<2, 1>;
  static __device__ int At(int row, int byte) {
    if (byte < 16) return 16 * row + byte;
    const int run = (byte - 16) / 32, in_run = (byte - 16) % 32;  // the fifth bits, then units
    return 256 + 512 * run + Interleaved<8>(row, in_run / 8, in_run % 8);
  }
  static __device__ float Element(const Block<BlocksQ5_K>& block, int i) {
    int scale, min;
    Header::Pair(block, i / 32, &scale, &min);
    const int q = (block[48 + i / 64 * 32 + i % 32] >> 4 * (i / 32 % 2) & 15) |
                  (block[16 + i % 32] >> i / 32 & 1) << 4;
    return block.Half(0) * scale * q - block.Half(2) * min;
  }
  static __device__ int Group(int unit, int g) { return 2 * unit + g; }
  template <class Strip>
  static __device__ void LoadWords(Strip strip, int unit, int lane, Unit* rows) {
    const uint4 h = strip.template Read<uint4>(256, lane);
    const uint4 q = strip.template Read<uint4>(768 + 512 * unit, lane);
    const uint32_t words[4] = {q.x, q.y, q.z, q.w}, high[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const uint32_t four = words[2 * w + r], fifth = high[2 * w + r] >> 2 * unit;
        rows[r].words[0][w] = static_cast<int>((four & 0x0f0f0f0fu) | (fifth & 0x01010101u) << 4);
        rows[r].words[1][w] =
            static_cast<int>((four >> 4 & 0x0f0f0f0fu) | (fifth & 0x02020202u) << 3);
      }
    }
  }
  template <class Strip>
  static __device__ void LoadScales(Strip strip, int unit, int row, Unit* of) {
    Header::Load(strip, unit, row, of);
  }
};

// Each half of 128 elements is four runs of 32: see BlockQ6_K. A unit is two of them, whose low
// bits share bytes. In a strip: scales of blocks; scales of 16 elements; halves' high bits; units'
// low bits.
struct BlocksQ6_K {
  static constexpr DType kType = DType::kQ6_K;
  static constexpr int kElements = 256, kBytes = 210, kUnits = 4;
  static constexpr bool kMin = false, kAdjacent = false;
  static constexpr int kLow = 0, kHigh = 128, kScales = 192, kScale = 208;  // of a block
  using Unit = UnitOf<2, 2>;
  static __device__ int At(int row, int byte) {
    if (byte >= kScale) return 2 * row + byte - kScale;
    if (byte >= kScales) return 32 + 16 * row + byte - kScales;
    const int in_run = byte % 32, word = in_run / 16, part = in_run % 16 / 4;
    const int at = Interleaved<8>(row, part, 4 * word + in_run % 4);
    return byte >= kHigh ? 288 + 512 * ((byte - kHigh) / 32) + at : 1312 + 512 * (byte / 32) + at;
  }
  static __device__ float Element(const Block<BlocksQ6_K>& block, int i) {
    const int half = i / 128, run = i / 32 % 4, lane = i % 32;
    const int low = block[64 * half + 32 * (run % 2) + lane] >> 4 * (run / 2) & 15;
    const int high = block[kHigh + 32 * half + lane] >> 2 * run & 3;
    return block.Half(kScale) * block.Signed(kScales + i / 16) * ((low | high << 4) - 32);
  }
  static __device__ int Group(int unit, int g) { return unit / 2 * 4 + unit % 2 + 2 * g; }
  template <class Strip>
  static __device__ void LoadWords(Strip strip, int unit, int lane, Unit* rows) {
    const uint4 h = strip.template Read<uint4>(288 + 512 * (unit / 2), lane);
    const uint4 q = strip.template Read<uint4>(1312 + 512 * unit, lane);
    const uint32_t low[4] = {q.x, q.y, q.z, q.w}, high[4] = {h.x, h.y, h.z, h.w};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const uint32_t four = low[2 * w + r], two = high[2 * w + r] >> unit % 2 * 2;
        rows[r].words[0][w] = Minus((four & 0x0f0f0f0fu) | (two & 0x03030303u) << 4, 0x20202020u);
        rows[r].words[1][w] = Minus((four >> 4 & 0x0f0f0f0fu) | (two & 0x30303030u), 0x20202020u);
      }
    }
  }
  template <class Strip>
  static __device__ void LoadScales(Strip strip, int unit, int row, Unit* of) {
    const float d = ScaleOf(strip, row);
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const uint32_t pair = strip.template Read<uint16_t>(32 + 16 * row, Group(unit, g));
      of->scale[g][0] = d * static_cast<float>(static_cast<int8_t>(pair & 255));
      of->scale[g][1] = d * static_cast<float>(static_cast<int8_t>(pair >> 8));
      of->min[g] = 0;
    }
  }
};

// All of a unit, of the lane's two rows.
template <class Format, class Strip>
__device__ __forceinline__ void LoadUnit(Strip strip, int unit, int lane,
                                         typename Format::Unit* rows) {
  Format::LoadWords(strip, unit, lane, rows);
#pragma unroll
  for (int r = 0; r < 2; ++r) Format::LoadScales(strip, unit, lane / 4 + 8 * r, &rows[r]);
}

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
