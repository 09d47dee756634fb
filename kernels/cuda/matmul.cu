// out = x · weightᵀ: chooses by weight type and, unless the backend is deterministic, number of
// rows.
#include <algorithm>

#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

// Up to here reading the weights is what takes time, beyond it the tensor cores are worth the
// rounding of x.
constexpr int64_t kFewFloatRows = 8;
constexpr int64_t kFewBlockRows = 32;

// cuBLASLt's kernels want rows of 16 bytes on all sides. Blocks, and x where it is rounded, are
// repacked into such.
bool RowsOf16(const View& v) {
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && BytesOf(v.dtype, v.stride[0]) % 16 == 0;
}

bool InTiles(const BackendContext& context, const Product& p) {
  const DType type = p.weight.dtype;
  if (context.deterministic) return type == DType::kBF16 || type == DType::kF16;
  return p.rows() > (IsQuantised(type) ? kFewBlockRows : kFewFloatRows) && RowsOf16(p.out) &&
         (IsQuantised(type) || RowsOf16(p.weight)) &&
         (p.x.dtype != TileType(type) || RowsOf16(p.x));
}

// Parts of one type whose rows follow each other in memory are one weight. Returns how many
// products that makes.
int Products(const MatMulArgs& a, Product (&products)[3]) {
  View parts[3];
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
  int64_t column = 0;
  for (int i = 0; i < count; ++i) {
    CHECK_EQ(parts[i].shape[1], a.x.shape[1]);
    CHECK_EQ(parts[i].packed, IsQuantised(parts[i].dtype)) << "blocks are multiplied in strips";
    products[i] = {a.x, parts[i], a.out.Columns(column, parts[i].shape[0])};
    column += products[i].columns();
  }
  CHECK_EQ(column, a.out.shape[1]);
  return count;
}

// Float weights that are not streamed; the fastest form that takes the product.
void MultiplyFewRows(BackendContext& context, const Product& p) {
  if (IsSkinny(p)) {
    MultiplySkinny(context, p);
  } else {
    MultiplyFloats(context, p);
  }
}

MatMulArgs RowsOf(MatMulArgs a, int64_t begin, int64_t count) {
  for (View* view : {&a.x, &a.out}) {
    view->data = view->row(begin);
    view->shape[0] = count;
  }
  return a;
}

}  // namespace

DType ProductInput(const BackendContext& context, const MatMulArgs& a) {
  Product products[3];
  MatMulArgs narrow = a;  // out may become BF16, which asks more of its columns
  narrow.out.dtype = DType::kBF16;
  const int count = Products(narrow, products);
  for (int i = 0; i < count; ++i) {
    Product& p = products[i];
    p.x.dtype = DType::kBF16;
    if (TileType(p.weight.dtype) != DType::kBF16 || !InTiles(context, p)) return DType::kF32;
  }
  return DType::kBF16;
}

bool MultiplyGated(BackendContext& context, const GatedMatMulArgs& a) {
  const View &x = a.product.x, &gate = a.product.parts[0], &up = a.product.parts[1];
  const bool alike = up.dtype == gate.dtype && up.stride[0] == gate.stride[0];
  if (context.deterministic || !alike) return false;
  if (x.dtype != DType::kF32 || a.out.dtype != DType::kF32) return false;
  CHECK_EQ(x.shape[0], a.out.shape[0]);
  CHECK_EQ(x.shape[1], gate.shape[1]);
  CHECK_EQ(x.shape[1], up.shape[1]);
  const Product p = {x, gate, a.out, up, a.activation};
  if (Streams(context, p)) {
    MultiplyStream(context, p);
  } else if (!IsQuantised(gate.dtype) && (IsSkinny(p) || (p.rows() == 1 && InVectors(p)))) {
    MultiplyFewRows(context, p);
  } else {
    return false;
  }
  return true;
}

void MatMul(BackendContext& context, const MatMulArgs& a) {
  CHECK(a.x.dtype == DType::kF32 || a.x.dtype == ProductInput(context, a)) << Info(a.x.dtype).name;
  CHECK(a.out.dtype == DType::kF32 || (a.out.dtype == DType::kBF16 && a.x.dtype == DType::kBF16))
      << Info(a.out.dtype).name;
  CHECK_EQ(a.x.shape[0], a.out.shape[0]);
  const int64_t rows = a.x.shape[0], in = a.x.shape[1];
  if (rows == 0) return;
  const int64_t most = QuantisedRows::MostRows(BackendContext::kWorkspaceBytes, in);
  if (rows > most) {
    for (int64_t begin = 0; begin < rows; begin += most) {
      MatMul(context, RowsOf(a, begin, std::min(most, rows - begin)));
    }
    return;
  }
  QuantisedRows quantised{};
  Product products[3];
  const int count = Products(a, products);
  for (int i = 0; i < count; ++i) {
    const Product& p = products[i];
    if (InTiles(context, p)) {
      MultiplyTiles(context, p);
      quantised = {};  // its memory was used
    } else if (!context.deterministic && Streams(context, p)) {
      MultiplyStream(context, p);
    } else if (IsQuantised(p.weight.dtype)) {
      if (quantised.q == nullptr) {  // once for all parts
        quantised = QuantisedRows::At(context.Workspace(QuantisedRows::Bytes(rows, in)), rows, in);
        QuantiseRows(context, a.x, quantised);
      }
      MultiplyBlocks(context, p, quantised);
    } else {
      MultiplyFewRows(context, p);
    }
  }
  CheckLaunch(context, "MatMul");
}

}  // namespace longspan::cuda
