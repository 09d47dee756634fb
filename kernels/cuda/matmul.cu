// out = x · weightᵀ: chooses by weight type and number of rows.
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

// Up to here reading the weights is what takes time, beyond it the tensor cores are worth the
// rounding of x.
constexpr int64_t kFewFloatRows = 8;
constexpr int64_t kFewBlockRows = 32;

// cuBLASLt's kernels want rows of 16 bytes on all sides. Blocks and halves are repacked into such.
bool Aligned(const Product& p) {
  const auto rows_of_16 = [](const View& v) {
    return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && BytesOf(v.dtype, v.stride[0]) % 16 == 0;
  };
  return rows_of_16(p.out) && (IsQuantised(p.weight.dtype) || rows_of_16(p.weight)) &&
         (p.weight.dtype != DType::kF32 || rows_of_16(p.x));
}

// Parts of one type whose rows follow each other in memory are one weight. Returns how many are
// left, in `parts`.
int Joined(const MatMulArgs& a, View (&parts)[3]) {
  int count = 0;
  for (int i = 0; i < a.part_count; ++i) {
    const View& part = a.parts[i];
    View* last = count > 0 ? &parts[count - 1] : nullptr;
    const bool follows = last != nullptr && part.dtype == last->dtype &&
                         part.stride[0] == last->stride[0] &&
                         part.data == last->row(last->shape[0]);
    if (follows) {
      last->shape[0] += part.shape[0];
    } else {
      parts[count++] = part;
    }
  }
  return count;
}

}  // namespace

void MatMul(BackendContext& context, const MatMulArgs& a) {
  CHECK(a.x.dtype == DType::kF32 && a.out.dtype == DType::kF32);
  CHECK_EQ(a.x.shape[0], a.out.shape[0]);
  const int64_t rows = a.x.shape[0], in = a.x.shape[1];
  if (rows == 0) return;
  QuantisedRows quantised{};
  int64_t column = 0;
  View parts[3];
  const int part_count = Joined(a, parts);
  for (int i = 0; i < part_count; ++i) {
    Product p{a.x, parts[i], a.out.Columns(column, parts[i].shape[0])};
    CHECK_EQ(p.weight.shape[1], in);
    column += p.columns();
    if (IsQuantised(p.weight.dtype)) {
      if (rows > kFewBlockRows && Aligned(p)) {
        MultiplyTiles(context, p);
        quantised = {};  // its memory was used
        continue;
      }
      if (quantised.q == nullptr) {  // once for all parts
        quantised = QuantisedRows::At(context.Workspace(QuantisedRows::Bytes(rows, in)), rows, in);
        QuantiseRows(context, a.x, quantised);
      }
      MultiplyBlocks(context, p, quantised);
    } else if (IsSkinny(p)) {
      MultiplySkinny(context, p);
    } else if (rows <= kFewFloatRows || !Aligned(p)) {
      MultiplyFloats(context, p);
    } else {
      MultiplyTiles(context, p);
      quantised = {};
    }
  }
  CHECK_EQ(column, a.out.shape[1]);
  CheckLaunch(context, "MatMul");
}

}  // namespace longspan::cuda
