#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "kernels/cpu/blocks.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

constexpr int64_t kRows = 9, kHeads = 3, kDim = 20, kStride = 100;

// Heads side by side in rows with a gap, to contiguous rows.
template <class To>
std::vector<To> ConvertHeads(std::vector<float>& x, DType type) {
  auto backend = Backend::Cpu({.threads = 3});
  std::vector<To> out(kRows * kHeads * kDim);
  ConvertArgs args;
  args.x =
      View::Matrix(x.data(), DType::kF32, kRows, kStride).Columns(8, kHeads * kDim).Heads(kHeads);
  args.out = View::Cube(out.data(), type, kRows, kHeads, kDim);
  backend->Run(backend->ops().Convert, args);
  return out;
}

TEST(Convert, RoundsStridedRowsToEachType) {
  std::mt19937 random(1);
  std::vector<float> x = testing::RandomFloats(kRows * kStride, random);
  const auto single = ConvertHeads<float>(x, DType::kF32);
  const auto half = ConvertHeads<uint16_t>(x, DType::kF16);
  const auto brain = ConvertHeads<uint16_t>(x, DType::kBF16);
  for (int64_t i = 0; i < kRows * kHeads * kDim; ++i) {
    const float value = x[i / (kHeads * kDim) * kStride + 8 + i % (kHeads * kDim)];
    ASSERT_EQ(single[i], value);
    ASSERT_EQ(half[i], FloatToHalf(value));  // proven in blocks_test.cc
    ASSERT_EQ(brain[i], FloatToBrain(value));
  }
}

TEST(Convert, TakesNoRows) {
  auto backend = Backend::Cpu({.threads = 1});
  float x = 0;
  ConvertArgs args;
  args.x = View::Matrix(&x, DType::kF32, 0, 4);
  args.out = View::Matrix(&x, DType::kBF16, 0, 4);
  backend->Run(backend->ops().Convert, args);
}

}  // namespace
}  // namespace longspan
