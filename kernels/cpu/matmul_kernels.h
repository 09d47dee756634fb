#pragma once
// The inner loops of MatMul, one table per instruction set. Every function computes a (row, output)
// result by the same chain of operations whatever the number of rows, so that a row's bits never
// depend on its neighbours.
//
// Float weights: lane l of a vector sums the products of elements i with i % lanes == l, in order,
// with fused multiply-add; the lanes are then summed by a fixed tree. BF16 weights by x rounded to
// BF16: lane l sums the pairs p of elements with p % 16 == l, the odd product of each first, the
// same way but with denormals as zero. Block weights: activations become int8 in groups of 32 with
// one fp32 scale each; each weight group's integer dot product is exact, and groups are added in
// order in fp32.
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/panels.h"
#include "kernels/dtype.h"

namespace longspan::cpu {

// Elements of x and of converted weights are padded with zeros to a multiple of this.
inline constexpr int kFloatPadding = 16;
// The same where x is rounded to BF16.
inline constexpr int kBf16Padding = 32;
// Activations that share a scale.
inline constexpr int kActivationGroup = 32;

// One product's rows of x and columns of weights; result (r, c) goes to out[r * out_stride + c].
template <class X>
struct ProductTile {
  const X* x;
  int64_t x_stride;
  int64_t rows;
  const std::byte* weights;
  int64_t weight_stride;  // bytes
  int64_t columns;
  int64_t in;  // a multiple of the padding
  bool cold;   // the weights come from memory, the rows after them will be next
  float* out;
  int64_t out_stride;
};

using FloatTile = ProductTile<float>;
using Bf16Tile = ProductTile<uint16_t>;

// Quantised rows of x, as I8 views hold them. q = round(x / scale) of each group of 32, |q| <= 127.
// Arrays of consecutive rows follow each other at in, in / 32, in / 16, … elements.
//
// The last two, which only AVX2 makes and reads, are where its 16-bit sums over 16 and over 32
// elements begin: the sums of q with i % 4 < 2 and of the others, in an int32's low and high half,
// -32 times and -16 times, by which levels of at most 6 and at most 5 bits become signed.
struct QuantisedRows {
  int8_t* q;          // [rows, in]
  float* scale;       // [rows, in / 32]
  float* sum16;       // [rows, in / 16] sums of q, exact
  float* sum32;       // [rows, in / 32] sums of q, exact
  float* scaled_sum;  // [rows, in / 32] scale * sum32
  int32_t* begin16;   // [rows, in / 16]
  int32_t* begin32;   // [rows, in / 32]

  // One array after another, not aligned beyond their types: one row of 32 fits where it was F32.
  static constexpr int64_t Bytes(int64_t rows, int64_t in) {
    return rows * in + 8 * sizeof(float) * (rows * in / 32);
  }
  static QuantisedRows At(void* memory, int64_t rows, int64_t in) {
    auto* q = static_cast<int8_t*>(memory);
    auto* floats = reinterpret_cast<float*>(q + rows * in);
    const int64_t groups = rows * in / 32;
    auto* begins = reinterpret_cast<int32_t*>(floats + 5 * groups);
    return {q,
            floats,
            floats + groups,
            floats + 3 * groups,
            floats + 4 * groups,
            begins,
            begins + 2 * groups};
  }
  QuantisedRows Row(int64_t row, int64_t in) const {
    const int64_t group = row * in / 32;
    return {q + row * in,       scale + group,       sum16 + 2 * group, sum32 + group,
            scaled_sum + group, begin16 + 2 * group, begin32 + group};
  }
};
static_assert(QuantisedRows::Bytes(1, 32) <= BytesOf(DType::kI8, 32));

// Room for a panel unpacked: element i of output o is levels[i / 4][o][i % 4]; its group's scale
// and min (formats that have one) are scales[i / kGroup][o] and mins[i / kGroup][o].
struct PanelMemory {
  uint8_t* levels;
  float* scales;
  float* mins;
};

// Some rows of x times one panel of a packed matrix (panels.h).
struct BlockTile {
  const uint8_t* panel;
  PanelMemory scratch;
  QuantisedRows x;
  int64_t rows;
  int64_t in;
  int64_t columns;  // <= kPanel, of this panel
  float* out;
  int64_t out_stride;
};

struct FloatKernels {
  void (*multiply)(const FloatTile& tile);                             // straight from the weights
  void (*widen)(const std::byte* weights, int64_t count, float* out);  // to F32, exact
};

// BF16 weights times x rounded to BF16.
struct RoundedKernels {
  void (*round)(const float* x, int64_t count, uint16_t* out);  // to nearest even
  void (*multiply)(const Bf16Tile& tile);
};

struct BlockKernels {
  // Packs a panel from one row of blocks per output.
  void (*pack)(const std::byte* const outputs[kPanel], int64_t in, uint8_t* panel);
  void (*multiply)(const BlockTile& tile);
};

struct MatMulKernels {
  FloatKernels f32, f16, bf16;
  RoundedKernels rounded_bf16 = {};  // where not null, in place of bf16
  BlockKernels q8_0, q4_0, q5_0, q4_k, q5_k, q6_k;
  void (*quantise)(const float* x, int64_t in, const QuantisedRows& row);
  int float_columns;  // outputs that are converted together
};

extern const MatMulKernels kPortableMatMul;

// The entry of a weight type; nullptr when it is not of that kind.
const FloatKernels* FloatKernelsOf(const MatMulKernels& kernels, DType type);
const BlockKernels* BlockKernelsOf(const MatMulKernels& kernels, DType type);

// Activations whose largest magnitude is below this are quantised to zero: 127 / amax must be
// finite.
inline constexpr float kSmallestActivation = 1e-30f;

}  // namespace longspan::cpu
