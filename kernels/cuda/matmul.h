#pragma once
// The parts of MatMul on CUDA. Each multiplies x by one weight into `columns` columns of out.
#include "kernels/cuda/context.h"
#include "kernels/ops.h"

namespace longspan::cuda {

// One weight and where its product goes.
struct Product {
  View x;       // [rows, in] F32; rounded only for MultiplyTiles and MultiplyInvariant
  View weight;  // [columns, in]
  View out;     // [rows, columns] F32; BF16 only for MultiplyTiles
  // Where given, as weight in type, shape and strides: out is activation(x · weightᵀ) * (x · upᵀ).
  View up = {};
  Activation activation = Activation::kSilu;
  int64_t rows() const { return x.shape[0]; }
  int64_t in() const { return x.shape[1]; }
  int64_t columns() const { return weight.shape[0]; }
};

// Tells a kernel's arguments of the product's x and out, both F32, and its activation.
template <class Args>
void DescribeRows(const Product& p, Args* a) {
  a->x = p.x.as<float>();
  a->x_stride = p.x.stride[0];
  a->out = p.out.as<float>();
  a->out_stride = p.out.stride[0];
  a->rows = static_cast<int>(p.rows());
  a->columns = static_cast<int>(p.columns());
  a->gelu = p.activation == Activation::kGeluTanh;
}

// x as int8 per group of 32 elements with one F32 scale, the form in which block weights are
// multiplied by few rows: the products of a group are then exact, as on the CPU.
constexpr int kQuantisedGroup = 32;
struct QuantisedRows {
  int8_t* q;       // [rows, in]
  float2* groups;  // [in / 32, stride]: of each row's group its scale, and the sum of its int8
  int64_t stride;  // rows in whole eights; what lies beyond `rows` is undefined

  static int64_t Stride(int64_t rows) { return (rows + 7) / 8 * 8; }
  static QuantisedRows At(void* memory, int64_t rows, int64_t in) {
    auto* q = static_cast<int8_t*>(memory);
    return {q, reinterpret_cast<float2*>(q + rows * in), Stride(rows)};
  }
  static size_t Bytes(int64_t rows, int64_t in) {
    return rows * in + in / kQuantisedGroup * Stride(rows) * sizeof(float2);
  }
  static int64_t MostRows(size_t bytes, int64_t in) {
    return static_cast<int64_t>(bytes) / (in + in / kQuantisedGroup * int64_t{sizeof(float2)}) / 8 *
           8;
  }
};

// Block weights lie in strips of 16 rows, in whole ones (blocks.cuh): what they take, how they are
// made of a file's rows in device memory, and what bf16 they stand for, packed rows of it.
int64_t StripBytes(DType type, int64_t rows, int64_t in);
void PackStrips(BackendContext& context, const View& rows, void* strips);
void UnpackStrips(BackendContext& context, const View& weight, void* out);

// Whether an F32 x and bf16 weights have rows of 16 bytes.
bool Bf16InVectors(const Product& product);
// One to kStreamRows rows of bf16 weights in whole vectors, or one to kStreamBlockRows of block
// weights, on sm_90: each weight is read once, most of them before x is there. A row's result does
// not depend on how many rows there are. Takes `up`. Of blocks every row costs products of its own,
// and every block of threads makes an x of bytes for itself, hence fewer rows: Gemma 3 4B in Q4_K,
// MultiplyBlocks -> streamed, ms a step on an H100: 1 row 2.70 -> 1.87, 4 rows 3.13 -> 2.51, 8 rows
// 3.32 -> 5.00; in Q8_0 3.36 -> 2.21, 3.72 -> 2.73, 3.97 -> 5.08.
constexpr int64_t kStreamRows = 8, kStreamBlockRows = 4;
bool Streams(const BackendContext& context, const Product& product);
void MultiplyStream(BackendContext& context, const Product& product);
// What they do for block weights.
bool StreamsBlocks(const BackendContext& context, const Product& product);
void MultiplyStreamOfBlocks(BackendContext& context, const Product& product);
// Two to kSkinnyRows rows of bf16 weights in whole vectors: each weight is read once. A row's
// result does not depend on how many rows there are. Takes `up`.
constexpr int64_t kSkinnyRows = 8;
bool IsSkinny(const Product& product);
void MultiplySkinny(BackendContext& context, const Product& product);
// Few rows: each weight is read once, by vector loads where all is InVectors, and multiplied in
// fp32. Takes `up` for one row in vectors.
bool InVectors(const Product& product);
void MultiplyFloats(BackendContext& context, const Product& product);
// Up to some tens of rows of block weights, straight from their strips: each block is read once for
// 32 rows. A row's result does not depend on how many rows there are beside it, if any; on a
// deterministic backend neither on whether.
void QuantiseRows(BackendContext& context, const View& x, const QuantisedRows& rows);
void MultiplyBlocks(BackendContext& context, const Product& product, const QuantisedRows& rows);
// Many rows, on the tensor cores, both sides in one type: the weight's; for blocks BF16, since
// activations of some models leave F16's range. An F32 x is rounded to it. Sums are F32.
inline DType TileType(DType weight) { return IsQuantised(weight) ? DType::kBF16 : weight; }
void MultiplyTiles(BackendContext& context, const Product& product);
// Any number of rows, x and weight both BF16 or both F16, of any alignment. A row's result depends
// neither on how many rows there are nor on its place among them.
void MultiplyInvariant(BackendContext& context, const Product& product);

// GatedMatMul where a form that takes `up` multiplies; else false, and nothing is done.
bool MultiplyGated(BackendContext& context, const GatedMatMulArgs& args);

// As Backend::ProductInput.
DType ProductInput(const BackendContext& context, const MatMulArgs& product);

// What MultiplyTiles found out about shapes; lives as long as the context.
struct TilePlans;
void FreeTilePlans(TilePlans* plans);

}  // namespace longspan::cuda
