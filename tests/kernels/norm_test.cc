// RmsNorm and AddRmsNorm against their formulas in double precision.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::RandomFloats;

constexpr float kEps = 1e-5f;
constexpr int kRows = 5;

View Vector(std::vector<float>& v) { return View::Vector(v.data(), DType::kF32, v.size()); }
View Rows(std::vector<float>& v) {
  return View::Matrix(v.data(), DType::kF32, kRows, v.size() / kRows);
}

// Rows of x, normed: mean square one, then weighted.
std::vector<double> Normed(const std::vector<double>& x, const std::vector<float>& weight) {
  const size_t dim = weight.size();
  std::vector<double> out(x.size());
  for (size_t row = 0; row < x.size(); row += dim) {
    double squares = 0;
    for (size_t d = 0; d < dim; ++d) squares += x[row + d] * x[row + d];
    const double scale = 1 / std::sqrt(squares / dim + double{kEps});
    for (size_t d = 0; d < dim; ++d) out[row + d] = x[row + d] * scale * weight[d];
  }
  return out;
}

class NormOnEachSimd : public ::testing::TestWithParam<const char*> {
 protected:
  NormOnEachSimd() : backend_(Backend::Cpu({.threads = 2, .simd = GetParam()})) {}
  std::unique_ptr<Backend> backend_;
};
INSTANTIATE_TEST_SUITE_P(Simd, NormOnEachSimd, ::testing::Values("portable", ""));

TEST_P(NormOnEachSimd, RmsNormEqualsItsFormula) {
  std::mt19937 random(1);
  for (int dim : {1, 7, 64, 384, 641}) {
    std::vector<float> x = RandomFloats(kRows * dim, random), weight = RandomFloats(dim, random);
    std::vector<float> out(x.size());
    backend_->Run(backend_->ops().RmsNorm, {Rows(x), Vector(weight), Rows(out), kEps});
    const std::vector<double> want = Normed({x.begin(), x.end()}, weight);
    for (size_t i = 0; i < out.size(); ++i) {
      // A sum of squares over at most 641 terms in eight lanes: a few fp32 roundings, relative.
      ASSERT_NEAR(out[i], want[i], 2e-6 * std::fabs(want[i]) + 1e-7) << dim;
    }
    backend_->Run(backend_->ops().RmsNorm, {Rows(x), Vector(weight), Rows(x), kEps});
    EXPECT_EQ(x, out) << "in place, " << dim;
  }
}

TEST_P(NormOnEachSimd, AddRmsNormEqualsItsFormula) {
  std::mt19937 random(2);
  for (int dim : {1, 7, 64, 384, 641}) {
    for (bool post_norm : {false, true}) {
      for (bool next_norm : {false, true}) {
        std::vector<float> x = RandomFloats(kRows * dim, random), residual = x;
        for (float& r : residual) r = 1 - 3 * r;
        std::vector<float> x_weight = RandomFloats(dim, random), weight = RandomFloats(dim, random);
        std::vector<float> out(x.size(), 77.0f), sum = residual;
        backend_->Run(backend_->ops().AddRmsNorm,
                      {Rows(x), post_norm ? Vector(x_weight) : View(), Rows(sum),
                       next_norm ? Vector(weight) : View(), Rows(out), kEps});
        std::vector<double> want(x.begin(), x.end());
        if (post_norm) want = Normed(want, x_weight);
        for (size_t i = 0; i < sum.size(); ++i) {
          // As RmsNorm, and the sum's rounding, relative to its terms.
          ASSERT_NEAR(sum[i], residual[i] + want[i],
                      3e-6 * (std::fabs(want[i]) + std::fabs(residual[i])));
        }
        if (!next_norm) {
          EXPECT_EQ(out, std::vector<float>(x.size(), 77.0f));
          continue;
        }
        want = Normed({sum.begin(), sum.end()}, weight);
        for (size_t i = 0; i < out.size(); ++i) {
          ASSERT_NEAR(out[i], want[i], 2e-6 * std::fabs(want[i]) + 1e-7) << dim;
        }
      }
    }
  }
}

// The three ops that it stands for, to the bit: what a product of fused operations must not change.
TEST_P(NormOnEachSimd, AddRmsNormIsRmsNormsAndASum) {
  std::mt19937 random(3);
  const int dim = 389;
  std::vector<float> x = RandomFloats(kRows * dim, random), sum = RandomFloats(kRows * dim, random);
  std::vector<float> x_weight = RandomFloats(dim, random), weight = RandomFloats(dim, random);
  std::vector<float> branch(x.size()), want(x.size()), out(x.size()), residual = sum;
  backend_->Run(backend_->ops().RmsNorm, {Rows(x), Vector(x_weight), Rows(branch), kEps});
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += branch[i];
  backend_->Run(backend_->ops().RmsNorm, {Rows(sum), Vector(weight), Rows(want), kEps});
  backend_->Run(backend_->ops().AddRmsNorm,
                {Rows(x), Vector(x_weight), Rows(residual), Vector(weight), Rows(out), kEps});
  EXPECT_EQ(residual, sum);
  EXPECT_EQ(out, want);
}

TEST(Cost, OfAddRmsNormCountsWhatIsGiven) {
  AddRmsNormArgs args;
  args.x = args.residual = args.out = View::Matrix(nullptr, DType::kF32, 3, 10);
  float weight[10];
  EXPECT_EQ(Cost(args).bytes, 3 * 30 * 4);
  EXPECT_EQ(Cost(args).flops, 30);
  args.x_weight = args.weight = View::Vector(weight, DType::kF32, 10);
  EXPECT_EQ(Cost(args).bytes, (4 * 30 + 2 * 10) * 4);
  EXPECT_EQ(Cost(args).flops, 9 * 30);
}

}  // namespace
}  // namespace longspan
