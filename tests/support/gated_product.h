#pragma once
// GatedMatMul beside MatMul of the same arguments, whose activation it is.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"
#include "tests/support/weights.h"

namespace longspan::testing {

struct GatedProduct {
  std::vector<float> gate_up;  // [rows, 2 * dim], by MatMul
  std::vector<float> out;      // [rows, dim]
};

// x is rounded to BF16 where the backend asks for it, and gate | up then BF16 too, as models do it.
// `between`: bytes from gate to up.
inline GatedProduct MultiplyGated(Backend& backend, const std::vector<float>& x, int64_t rows,
                                  const Weights& gate, const Weights& up, Activation activation,
                                  DType out_type = DType::kF32, int64_t between = 0) {
  const int64_t in = gate.columns, dim = gate.rows;
  const auto bytes = [&](const Weights& w) {
    return std::max(backend.WeightBytes(w.view()), w.view().bytes());
  };
  const Buffer weights = backend.Allocate(bytes(gate) + between + bytes(up));
  const Buffer x_there = backend.Allocate(rows * in * sizeof(float)),
               product_there = backend.Allocate(rows * 2 * dim * sizeof(float)),
               out_there = backend.Allocate(rows * dim * sizeof(float));
  GatedMatMulArgs args;
  args.activation = activation;
  MatMulArgs& product = args.product;
  product.part_count = 2;
  product.parts[0] = Place(backend, gate.view(), weights.data());
  product.parts[1] = Place(backend, up.view(), weights.data() + bytes(gate) + between);
  product.x = View::Matrix(x_there.data(), DType::kF32, rows, in);
  product.out = View::Matrix(product_there.data(), DType::kF32, rows, 2 * dim);
  if (backend.ProductInput(product) == DType::kBF16) {
    product.x.dtype = product.out.dtype = DType::kBF16;
  }
  args.out = View::Matrix(out_there.data(), out_type, rows, dim);
  if (product.x.dtype == DType::kBF16) {
    std::vector<uint16_t> half(x.size());
    std::transform(x.begin(), x.end(), half.begin(), ToBf16);
    backend.CopyIn(x_there.data(), half.data(), product.x.bytes());
  } else {
    backend.CopyIn(x_there.data(), x.data(), product.x.bytes());
  }
  const auto home = [&](const View& view) {
    std::vector<float> values(view.elements());
    std::vector<uint16_t> half(view.elements());
    const bool narrow = view.dtype == DType::kBF16;
    backend.CopyOut(narrow ? static_cast<void*>(half.data()) : values.data(), view.data,
                    view.bytes());
    if (narrow) std::transform(half.begin(), half.end(), values.begin(), FromBf16);
    return values;
  };
  GatedProduct result;
  backend.Run(backend.ops().MatMul, product);
  result.gate_up = home(product.out);
  backend.Run(backend.ops().GatedMatMul, args);
  result.out = home(args.out);
  EXPECT_EQ(backend.Fault(), "");
  return result;
}

// Of out's element i: by how much it may differ where gate and up each differ by `sums`, since
// neither activation is steeper than 1.2.
inline double AllowanceOfSums(const GatedProduct& p, int64_t dim, size_t i, double sums) {
  const size_t at = i / dim * 2 * dim + i % dim;
  return sums * (std::fabs(p.gate_up[at]) + 1.2 * std::fabs(p.gate_up[at + dim]));
}

// The formula, in doubles, of what MatMul gave: three roundings, and an exponential's 2^-20; and
// `sums`, by which its sums may be others than those within out.
inline void ExpectActivated(const GatedProduct& p, int64_t dim, Activation activation,
                            double sums = 0) {
  ASSERT_EQ(2 * p.out.size(), p.gate_up.size());
  for (size_t i = 0; i < p.out.size(); ++i) {
    const size_t at = i / dim * 2 * dim + i % dim;
    const double g = p.gate_up[at], u = p.gate_up[at + dim];
    const double silu = g / (1 + std::exp(-g));
    const double gelu = 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
    const double want = (activation == Activation::kSilu ? silu : gelu) * u;
    ASSERT_NEAR(p.out[i], want,
                3e-6 * std::fabs(want) + 2e-6 * std::max(1.0, std::fabs(u)) +
                    AllowanceOfSums(p, dim, i, sums))
        << "row " << i / dim << " column " << i % dim << ", gate " << g << " up " << u;
  }
}

}  // namespace longspan::testing
