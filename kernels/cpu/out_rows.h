#pragma once
// Rows that the next product takes as its x: F32 where they lie, or I8, each quantised right after
// it is made, while the thread's L1 cache has it.
#include "kernels/check.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/instruction_set.h"

namespace longspan::cpu {

class OutRows {
 public:
  OutRows(BackendContext& context, const View& out) : context_(context), out_(out) {
    if (out.dtype == DType::kF32) return;
    CHECK(out.dtype == DType::kI8) << Info(out.dtype).name;
    CHECK_EQ(out.stride[0], out.shape[1]);
    CHECK_EQ(out.shape[1] % kActivationGroup, 0);
    quantise_ = SetOf(context.simd).matmul.quantise;
    quantised_ = QuantisedRows::At(out.data, out.shape[0], out.shape[1]);
  }

  // make(to) writes the row. Takes the thread's scratch.
  template <class Make>
  void Write(int64_t row, int thread, const Make& make) const {
    if (quantise_ == nullptr) {
      make(out_.as<float>() + row * out_.stride[0]);
      return;
    }
    const int64_t dim = out_.shape[1];
    auto* made = reinterpret_cast<float*>(context_.Scratch(thread, sizeof(float) * dim));
    make(made);
    quantise_(made, dim, quantised_.Row(row, dim));
  }

 private:
  BackendContext& context_;
  const View& out_;
  void (*quantise_)(const float* x, int64_t in, const QuantisedRows& row) = nullptr;
  QuantisedRows quantised_ = {};
};

}  // namespace longspan::cpu
