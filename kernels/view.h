#pragma once
// A typed, strided look at memory that somebody else owns. std only: nvcc compiles this.
#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

// Up to three dimensions, the last one contiguous. A view of quantised type is a weight matrix of
// whole, unstrided rows; or keys or values, whose strides and last dimension are whole blocks.
// `packed` ones are in the form that Backend::PlaceWeights gave them, and have no rows.
struct View {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  int64_t shape[3] = {0, 0, 0};
  int64_t stride[3] = {0, 0, 0};  // in elements
  bool packed = false;

  bool empty() const { return data == nullptr || elements() == 0; }
  int64_t elements() const {
    int64_t n = rank > 0 ? 1 : 0;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  int64_t bytes() const { return BytesOf(dtype, elements()); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  // Pointer to row i of the first dimension.
  std::byte* row(int64_t i) const {
    return static_cast<std::byte*>(data) + BytesOf(dtype, i * stride[0]);
  }

  static View Vector(void* data, DType dtype, int64_t n) {
    return {data, dtype, 1, {n, 0, 0}, {1, 0, 0}, false};
  }
  static View Matrix(void* data, DType dtype, int64_t rows, int64_t columns) {
    return {data, dtype, 2, {rows, columns, 0}, {columns, 1, 0}, false};
  }
  static View Cube(void* data, DType dtype, int64_t a, int64_t b, int64_t c) {
    return {data, dtype, 3, {a, b, c}, {b * c, c, 1}, false};
  }
  // Columns [begin, begin + count) of a matrix, whole blocks; keeps the row stride.
  View Columns(int64_t begin, int64_t count) const {
    View v = *this;
    v.data = static_cast<std::byte*>(data) + BytesOf(dtype, begin);
    v.shape[1] = count;
    return v;
  }
  // The first `count` rows.
  View Rows(int64_t count) const {
    View v = *this;
    v.shape[0] = count;
    return v;
  }
  // A [rows, heads * dim] matrix seen as [rows, heads, dim]; keeps the row stride.
  View Heads(int64_t heads) const {
    View v = *this;
    v.rank = 3;
    v.shape[2] = shape[1] / heads;
    v.shape[1] = heads;
    v.stride[1] = v.shape[2];
    v.stride[2] = 1;
    return v;
  }
};

}  // namespace longspan
