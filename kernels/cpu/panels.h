#pragma once
// How block weights lie in memory on this backend: panels of kPanel outputs, packed once from the
// rows of blocks that files hold, in as many bits a level. A step of four elements of all outputs
// is 64 bytes of levels, [output][element], which is what the dot-product instructions take; a run
// of 32 elements is eight steps, packed as
//   8 bits: the steps one after another;
//   fewer:  vector j of four has step 2 j in its low nibbles and step 2 j + 1 in its high ones;
//   5 bits: one more vector, whose bit s belongs to step s;
//   6 bits: two more vectors, for steps 0 to 3 and 4 to 7: bits 2 f and 2 f + 1 belong to step f.
// After all runs come the scales of each block: d of all outputs (F16), dmin where the format has
// mins, then for each group that has an 8-bit scale (and min) those of all outputs. A panel's bytes
// are a multiple of 64. Outputs beyond the matrix repeat its last one.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/cpu/blocks.h"
#include "kernels/view.h"

namespace longspan::cpu {

inline constexpr int kPanel = 16;              // outputs
inline constexpr int kStepBytes = 4 * kPanel;  // levels of four elements, unpacked
inline constexpr int kRunSteps = 8;

template <class Format>
struct PackedPanel {
  static constexpr int kElements = Info(Format::kType).block_elements;
  static constexpr int kGroups = kElements / Format::kGroup;
  static constexpr int kRunBytes = kStepBytes * Format::kBits;
  static constexpr int kHalves = 2 * kPanel;  // bytes of d, or dmin, of all outputs
  static constexpr int kGroupBytes = kElements == 32 ? 0 : Format::kMin ? 2 * kPanel : kPanel;
  static constexpr int kScaleBytes =
      (Format::kMin ? 2 * kHalves : kHalves) + kGroups * kGroupBytes;  // of one block
  // A run's share of a panel's bytes, scales included.
  static constexpr int kRunShare = kRunBytes + kScaleBytes * 32 / kElements;

  static constexpr int64_t ScalesAt(int64_t in) { return in / 32 * kRunBytes; }
  static constexpr int64_t Bytes(int64_t in) {
    return (ScalesAt(in) + in / kElements * kScaleBytes + 63) / 64 * 64;
  }

  // Byte `byte` of step `step` of a run.
  static uint8_t Level(const uint8_t* run, int step, int byte) {
    if (Format::kBits == 8) return run[kStepBytes * step + byte];
    const int nibble = run[kStepBytes * (step / 2) + byte] >> 4 * (step % 2) & 15;
    const uint8_t* high = run + 4 * kStepBytes;
    if (Format::kBits == 5) return nibble | (high[byte] >> step & 1) << 4;
    if (Format::kBits == 6) {
      return nibble | (high[kStepBytes * (step / 4) + byte] >> 2 * (step % 4) & 3) << 4;
    }
    return nibble;
  }

  static void PackRun(const uint8_t* steps, uint8_t* run) {
    if (Format::kBits == 8) {
      std::memcpy(run, steps, kRunBytes);
      return;
    }
    const auto step = [steps](int s) { return steps + kStepBytes * s; };
    for (int j = 0; j < 4; ++j) {
      const uint8_t *low = step(2 * j), *high = step(2 * j + 1);
      uint8_t* to = run + kStepBytes * j;
      for (int i = 0; i < kStepBytes; ++i) {
        to[i] = static_cast<uint8_t>((low[i] & 15) | high[i] << 4);
      }
    }
    constexpr int kFieldBits = Format::kBits - 4, kFields = kFieldBits == 0 ? 8 : 8 / kFieldBits;
    for (int first = 0; kFieldBits > 0 && first < kRunSteps; first += kFields) {
      uint8_t field[kStepBytes] = {};
      for (int s = 0; s < kFields; ++s) {
        const uint8_t* from = step(first + s);
        for (int i = 0; i < kStepBytes; ++i) field[i] |= from[i] >> 4 << kFieldBits * s;
      }
      std::memcpy(run + kStepBytes * (4 + first / kFields), field, kStepBytes);
    }
  }

  // Of block `index` of each output.
  static void PackScales(const std::byte* const outputs[kPanel], int64_t index, uint8_t* to) {
    for (int o = 0; o < kPanel; ++o) {
      typename Format::Block block;
      std::memcpy(&block, outputs[o] + index * sizeof(block), sizeof(block));
      std::memcpy(to + 2 * o, &block.d, 2);
      if constexpr (Format::kMin) {
        std::memcpy(to + kHalves + 2 * o, &block.dmin, 2);
        uint8_t scales[8], mins[8];
        SixBitPairs(block.scales, scales, mins);
        for (int g = 0; g < kGroups; ++g) {
          to[2 * kHalves + kGroupBytes * g + o] = scales[g];
          to[2 * kHalves + kGroupBytes * g + kPanel + o] = mins[g];
        }
      } else if constexpr (kGroupBytes > 0) {
        for (int g = 0; g < kGroups; ++g) {
          to[kHalves + kGroupBytes * g + o] = static_cast<uint8_t>(block.scales[g]);
        }
      }
    }
  }

  // Of one group of one output, from the scales of its block; min only where the format has one.
  static void Scale(const uint8_t* scales, int group, int output, float* scale, float* min) {
    const auto half = [&](int at) {
      uint16_t bits;
      std::memcpy(&bits, scales + at + 2 * output, 2);
      return HalfToFloat(bits);
    };
    *scale = half(0);
    if constexpr (Format::kMin) {
      const uint8_t* bytes = scales + 2 * kHalves + kGroupBytes * group + output;
      *scale *= bytes[0];
      *min = half(kHalves) * bytes[kPanel];
    } else if constexpr (kGroupBytes > 0) {
      *scale *= static_cast<int8_t>(scales[kHalves + kGroupBytes * group + output]);
    }
  }
};

// Bytes of one panel of a matrix of `in` columns, and of all that `rows` outputs fill.
int64_t PackedPanelBytes(DType type, int64_t in);
inline int64_t PackedBytes(DType type, int64_t rows, int64_t in) {
  return (rows + kPanel - 1) / kPanel * PackedPanelBytes(type, in);
}

// A matrix of rows of blocks, packed at `to` by the context's team.
struct BackendContext;
View PackWeights(BackendContext& context, const View& matrix, std::byte* to);

// out[i] = element i of row `row` of a packed matrix, as DequantiseRow gives it.
void DequantisePackedRow(const View& matrix, int64_t row, float* out);

}  // namespace longspan::cpu
