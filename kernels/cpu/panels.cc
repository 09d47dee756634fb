#include "kernels/cpu/panels.h"

#include "kernels/check.h"

namespace longspan::cpu {
namespace {

template <class Format>
void DequantiseOutput(const uint8_t* panel, int output, int64_t in, float* out) {
  using Packed = PackedPanel<Format>;
  const uint8_t* scales = panel + Packed::ScalesAt(in);
  float scale = 0, min = 0;
  for (int64_t i = 0; i < in; ++i) {
    if (i % Format::kGroup == 0) {
      Packed::Scale(scales + i / Packed::kElements * Packed::kScaleBytes,
                    static_cast<int>(i % Packed::kElements / Format::kGroup), output, &scale, &min);
    }
    const uint8_t level =
        Packed::Level(panel + i / 32 * Packed::kRunBytes, static_cast<int>(i % 32 / 4),
                      static_cast<int>(4 * output + i % 4));
    out[i] = scale * static_cast<float>(level - Format::kOffset) - min;
  }
}

}  // namespace

int64_t PackedPanelBytes(DType type, int64_t in) {
  int64_t bytes = 0;
  const bool known =
      VisitFormat(type, [&](auto format) { bytes = PackedPanel<decltype(format)>::Bytes(in); });
  CHECK(known) << Info(type).name << " has no blocks";
  return bytes;
}

void DequantisePackedRow(const View& matrix, int64_t row, float* out) {
  const int64_t in = matrix.shape[1];
  const uint8_t* panel =
      matrix.as<const uint8_t>() + row / kPanel * PackedPanelBytes(matrix.dtype, in);
  VisitFormat(matrix.dtype, [&](auto format) {
    DequantiseOutput<decltype(format)>(panel, static_cast<int>(row % kPanel), in, out);
  });
}

}  // namespace longspan::cpu
