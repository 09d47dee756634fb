// The small ops against their formulas in double precision.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/backend.h"

namespace longspan {
namespace {

std::vector<float> Normal(size_t n, float scale = 1) {
  std::mt19937 random(static_cast<uint32_t>(n));
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

class OpOnEachSimd : public ::testing::TestWithParam<const char*> {
 protected:
  OpOnEachSimd() : backend_(Backend::Cpu({.threads = 2, .simd = GetParam()})) {}
  std::unique_ptr<Backend> backend_;
};
INSTANTIATE_TEST_SUITE_P(Simd, OpOnEachSimd, ::testing::Values("portable", ""));

TEST_P(OpOnEachSimd, RmsNormEqualsItsFormula) {
  for (int dim : {1, 7, 64, 384, 641}) {
    const int rows = 5;
    std::vector<float> x = Normal(rows * dim, 3), w = Normal(dim), out(rows * dim);
    backend_->Run(
        backend_->ops().RmsNorm,
        {View::Matrix(x.data(), DType::kF32, rows, dim), View::Vector(w.data(), DType::kF32, dim),
         View::Matrix(out.data(), DType::kF32, rows, dim), 1e-6f});
    for (int r = 0; r < rows; ++r) {
      double squares = 0;
      for (int d = 0; d < dim; ++d) squares += std::pow(x[r * dim + d], 2);
      for (int d = 0; d < dim; ++d) {
        const double want = x[r * dim + d] / std::sqrt(squares / dim + 1e-6) * w[d];
        // A sum of squares over at most 641 terms: a few fp32 roundings, relative.
        ASSERT_NEAR(out[r * dim + d], want, 2e-6 * std::fabs(want) + 1e-7);
      }
    }
  }
}

TEST_P(OpOnEachSimd, RmsNormOfHeadsLeavesTheRestOfARowAlone) {
  // Heads 2 × 4 inside rows of 12: the last four columns are someone else's.
  std::vector<float> x = Normal(3 * 12), before = x, w(4, 1.0f);
  const View heads = View::Matrix(x.data(), DType::kF32, 3, 12).Columns(0, 8).Heads(2);
  backend_->Run(backend_->ops().RmsNorm,
                {heads, View::Vector(w.data(), DType::kF32, 4), heads, 0.0f});
  for (int r = 0; r < 3; ++r) {
    for (int h = 0; h < 2; ++h) {
      double squares = 0;
      for (int d = 0; d < 4; ++d) squares += std::pow(x[r * 12 + h * 4 + d], 2);
      EXPECT_NEAR(squares, 4.0, 1e-5);  // a normed head of four has squares that add up to four
    }
    for (int d = 8; d < 12; ++d) EXPECT_EQ(x[r * 12 + d], before[r * 12 + d]);
  }
}

TEST_P(OpOnEachSimd, RopeRotatesEachPairByPositionTimesFrequency) {
  for (bool interleaved : {false, true}) {
    const int heads = 2, dim = 12, pairs = 4;  // partial: the last four dims stay
    const std::vector<int32_t> positions = {0, 1, 77, 16383, 131071};
    std::vector<float> frequencies = {1.0f, 0.31622776f, 0.1f, 0.000123f};
    std::vector<float> x = Normal(positions.size() * heads * dim), y = x;
    RopeArgs args{
        View::Matrix(y.data(), DType::kF32, positions.size(), heads * dim).Heads(heads),
        View::Vector(const_cast<int32_t*>(positions.data()), DType::kI32, positions.size()),
        View::Vector(frequencies.data(), DType::kF32, pairs), interleaved};
    backend_->Run(backend_->ops().Rope, args);
    for (size_t t = 0; t < positions.size(); ++t) {
      for (int h = 0; h < heads; ++h) {
        const float* in = &x[(t * heads + h) * dim];
        const float* out = &y[(t * heads + h) * dim];
        for (int i = 0; i < pairs; ++i) {
          const int a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + pairs;
          // The angle is a float product, as in the reference models.
          const double angle = static_cast<float>(positions[t]) * frequencies[i];
          EXPECT_NEAR(out[a], in[a] * std::cos(angle) - in[b] * std::sin(angle), 1e-6);
          EXPECT_NEAR(out[b], in[b] * std::cos(angle) + in[a] * std::sin(angle), 1e-6);
        }
        for (int d = 2 * pairs; d < dim; ++d) EXPECT_EQ(out[d], in[d]);
      }
    }
  }
}

TEST_P(OpOnEachSimd, GatedActivationsEqualTheirFormulas) {
  const int rows = 3, dim = 37;
  std::vector<float> x = Normal(rows * 2 * dim, 4), out(rows * dim);
  x[0] = 200, x[1] = -200, x[2] = 0;  // far beyond where exp overflows
  for (Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    backend_->Run(backend_->ops().GatedActivation,
                  {View::Matrix(x.data(), DType::kF32, rows, 2 * dim),
                   View::Matrix(out.data(), DType::kF32, rows, dim), activation});
    for (int r = 0; r < rows; ++r) {
      for (int d = 0; d < dim; ++d) {
        const double g = x[r * 2 * dim + d], u = x[r * 2 * dim + dim + d];
        const double silu = g / (1 + std::exp(-g));
        const double gelu =
            0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)));
        const double want = (activation == Activation::kSilu ? silu : gelu) * u;
        ASSERT_NEAR(out[r * dim + d], want, 3e-6 * std::fabs(want) + 2e-6);
      }
    }
  }
}

TEST_P(OpOnEachSimd, AddGatherAndSoftcapDoWhatTheirNamesSay) {
  std::vector<float> x = Normal(4 * 6), out = Normal(24), before = out;
  const View a = View::Matrix(x.data(), DType::kF32, 4, 6),
             b = View::Matrix(out.data(), DType::kF32, 4, 6);
  backend_->Run(backend_->ops().Add, {a, b});
  for (int i = 0; i < 24; ++i) EXPECT_EQ(out[i], before[i] + x[i]);

  std::vector<int32_t> rows = {3, 0, 3};
  std::vector<float> gathered(18);
  backend_->Run(backend_->ops().Gather, {a, View::Vector(rows.data(), DType::kI32, 3),
                                         View::Matrix(gathered.data(), DType::kF32, 3, 6)});
  for (int r = 0; r < 3; ++r) {
    for (int d = 0; d < 6; ++d) EXPECT_EQ(gathered[r * 6 + d], x[rows[r] * 6 + d]);
  }

  std::vector<float> capped = x;
  backend_->Run(backend_->ops().Softcap, {View::Matrix(capped.data(), DType::kF32, 4, 6), 1.5f});
  for (int i = 0; i < 24; ++i) EXPECT_NEAR(capped[i], 1.5 * std::tanh(x[i] / 1.5), 1e-6);
}

}  // namespace
}  // namespace longspan
