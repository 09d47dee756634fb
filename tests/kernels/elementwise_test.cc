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

TEST_P(OpOnEachSimd, GatherAndSoftcapDoWhatTheirNamesSay) {
  std::vector<float> x = Normal(4 * 6);
  const View a = View::Matrix(x.data(), DType::kF32, 4, 6);
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
