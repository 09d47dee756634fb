#include "kernels/cpu/blocks.h"

#include "kernels/check.h"

namespace longspan {
namespace {

template <class Format>
void DequantiseBlocks(const std::byte* row, int64_t elements, float* out) {
  using Block = typename Format::Block;
  constexpr int kElements = Info(Format::kType).block_elements;
  float scale[16], min[16] = {};
  uint8_t level[32];
  for (int64_t b = 0; b < elements / kElements; ++b) {
    Block block;
    std::memcpy(&block, row + b * sizeof(Block), sizeof(Block));
    Format::Scales(block, scale, min);
    for (int run = 0; run < kElements / 32; ++run) {
      Format::Levels(block, run, level);
      for (int i = 0; i < 32; ++i) {
        const int group = (32 * run + i) / Format::kGroup;
        *out++ = scale[group] * (level[i] - Format::kOffset) - min[group];
      }
    }
  }
}

template <float (*kConvert)(uint16_t)>
void Widen(const std::byte* row, int64_t elements, float* out) {
  for (int64_t i = 0; i < elements; ++i) {
    uint16_t value;
    std::memcpy(&value, row + 2 * i, 2);
    out[i] = kConvert(value);
  }
}

}  // namespace

void DequantiseRow(DType type, const std::byte* row, int64_t elements, float* out) {
  switch (type) {
    case DType::kF32:
      std::memcpy(out, row, 4 * elements);
      return;
    case DType::kF16:
      Widen<HalfToFloat>(row, elements, out);
      return;
    case DType::kBF16:
      Widen<BrainToFloat>(row, elements, out);
      return;
    default:
      break;
  }
  const bool known = VisitFormat(
      type, [&](auto format) { DequantiseBlocks<decltype(format)>(row, elements, out); });
  CHECK(known) << Info(type).name << " is not a weight type";
}

}  // namespace longspan
