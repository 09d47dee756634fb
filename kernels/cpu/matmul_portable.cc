// MatMul's inner loops in plain C++: the specification of the others.
#include <algorithm>
#include <cmath>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/matmul_kernels.h"

namespace longspan::cpu {
namespace {

constexpr int kLanes = 8;

template <DType kType>
void Widen(const std::byte* weights, int64_t count, float* out) {
  DequantiseRow(kType, weights, count, out);
}

template <DType kType>
void MultiplyFloat(const FloatTile& t) {
  float weights[kFloatPadding];
  constexpr int kBytes = Info(kType).block_bytes;
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* x = t.x + r * t.x_stride;
    for (int64_t c = 0; c < t.columns; ++c) {
      const std::byte* w = t.weights + c * t.weight_stride;
      float sum[kLanes] = {};
      for (int64_t i = 0; i < t.in; i += kFloatPadding) {
        DequantiseRow(kType, w + i * kBytes, kFloatPadding, weights);
        for (int j = 0; j < kFloatPadding; ++j) sum[j % kLanes] += x[i + j] * weights[j];
      }
      t.out[r * t.out_stride + c] =
          ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
    }
  }
}

void Quantise(const float* x, int64_t in, const QuantisedRows& row) {
  for (int64_t g = 0; g < in / kActivationGroup; ++g, x += kActivationGroup) {
    uint32_t bits = 0;  // of the largest magnitude; NaN is the largest of all
    for (int i = 0; i < kActivationGroup; ++i) {
      bits = std::max(bits, std::bit_cast<uint32_t>(std::fabs(x[i])));
    }
    const float largest = std::bit_cast<float>(bits);
    const bool zero = largest < kSmallestActivation;
    const float inverse = zero ? 0 : 127 / largest;
    int sum[2] = {};
    for (int i = 0; i < kActivationGroup; ++i) {
      // Beside an infinity or NaN nothing has an integer: all become 0, and the scale carries it
      // on.
      const float scaled = x[i] * inverse;
      const int q = std::fabs(scaled) <= 127.5f ? static_cast<int>(std::nearbyintf(scaled)) : 0;
      row.q[kActivationGroup * g + i] = static_cast<int8_t>(q);
      sum[i / 16] += q;
    }
    const float scale = zero ? 0 : largest / 127;
    row.scale[g] = scale;
    row.sum16[2 * g] = sum[0];
    row.sum16[2 * g + 1] = sum[1];
    row.sum32[g] = sum[0] + sum[1];
    row.scaled_sum[g] = scale * (sum[0] + sum[1]);
  }
}

template <class Format>
void Pack(const std::byte* const outputs[kPanel], int64_t in, uint8_t* packed) {
  using Packed = PackedPanel<Format>;
  using Block = typename Format::Block;
  uint8_t level[32], steps[kRunSteps * kStepBytes];
  for (int64_t b = 0; b < in / Packed::kElements; ++b) {
    Packed::PackScales(outputs, b, packed + Packed::ScalesAt(in) + b * Packed::kScaleBytes);
    for (int run = 0; run < Packed::kElements / 32; ++run) {
      for (int o = 0; o < kPanel; ++o) {
        Block block;
        std::memcpy(&block, outputs[o] + b * sizeof(Block), sizeof(Block));
        Format::Levels(block, run, level);
        for (int i = 0; i < 32; ++i) steps[i / 4 * kStepBytes + 4 * o + i % 4] = level[i];
      }
      Packed::PackRun(steps, packed + (b * Packed::kElements / 32 + run) * Packed::kRunBytes);
    }
  }
}

template <class Format>
void Unpack(const uint8_t* packed, int64_t in, const PanelMemory& memory) {
  using Packed = PackedPanel<Format>;
  for (int64_t i = 0; i < in * kPanel; ++i) {
    const auto step = static_cast<int>(i / kStepBytes % kRunSteps);
    memory.levels[i] = Packed::Level(packed + i / (32 * kPanel) * Packed::kRunBytes, step,
                                     static_cast<int>(i % kStepBytes));
  }
  for (int64_t i = 0; i < in / Format::kGroup * kPanel; ++i) {
    const int64_t group = i / kPanel;
    const uint8_t* scales =
        packed + Packed::ScalesAt(in) + group / Packed::kGroups * Packed::kScaleBytes;
    Packed::Scale(scales, static_cast<int>(group % Packed::kGroups), static_cast<int>(i % kPanel),
                  memory.scales + i, memory.mins + i);
  }
}

// Adds the exact dot products of `elements` levels and activations of each output.
void DotLevels(const uint8_t* levels, const int8_t* q, int elements, int32_t dot[kPanel]) {
  for (int i = 0; i < elements; i += 4, levels += 4 * kPanel, q += 4) {
    for (int o = 0; o < kPanel; ++o) {
      const uint8_t* l = levels + 4 * o;
      dot[o] += l[0] * q[0] + l[1] * q[1] + l[2] * q[2] + l[3] * q[3];
    }
  }
}

template <class Format>
void MultiplyBlocks(const BlockTile& t) {
  constexpr int kGroup = Format::kGroup;
  const int64_t groups = t.in / kGroup;
  Unpack<Format>(t.panel, t.in, t.scratch);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int8_t* q = t.x.q + r * t.in;
    const float* scale = t.x.scale + r * (t.in / 32);
    const float* sum = kGroup == 16 ? t.x.sum16 + r * groups : t.x.sum32 + r * groups;
    const float* scaled_sum = t.x.scaled_sum + r * (t.in / 32);
    float result[kPanel] = {};
    for (int64_t g = 0; g < groups; ++g) {
      int32_t dot[kPanel] = {};
      DotLevels(t.scratch.levels + g * kGroup * kPanel, q + g * kGroup, kGroup, dot);
      const float x_scale = scale[g * kGroup / 32];
      for (int o = 0; o < kPanel; ++o) {
        const float signed_dot = static_cast<float>(dot[o]) - Format::kOffset * sum[g];
        result[o] += signed_dot * (t.scratch.scales[g * kPanel + o] * x_scale);
        if (Format::kMin) result[o] -= t.scratch.mins[g * kPanel + o] * scaled_sum[g];
      }
    }
    std::copy_n(result, t.columns, t.out + r * t.out_stride);
  }
}

template <class Format>
constexpr BlockKernels BlockEntry() {
  return {Pack<Format>, MultiplyBlocks<Format>};
}

template <DType kType>
constexpr FloatKernels FloatEntry() {
  return {MultiplyFloat<kType>, Widen<kType>};
}

}  // namespace

const MatMulKernels kPortableMatMul = {
    .f32 = FloatEntry<DType::kF32>(),
    .f16 = FloatEntry<DType::kF16>(),
    .bf16 = FloatEntry<DType::kBF16>(),
    .q8_0 = BlockEntry<FormatQ8_0>(),
    .q4_0 = BlockEntry<FormatQ4_0>(),
    .q5_0 = BlockEntry<FormatQ5_0>(),
    .q4_k = BlockEntry<FormatQ4_K>(),
    .q5_k = BlockEntry<FormatQ5_K>(),
    .q6_k = BlockEntry<FormatQ6_K>(),
    .quantise = Quantise,
    .float_columns = 8,
};

}  // namespace longspan::cpu
