// Embed, Gather and Softcap on the GPU, on shapes of models and on odd ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/support/gpu_beside_cpu.h"
#include "tests/support/travel.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::RandomFloats;
using testing::Travel;

constexpr float kUntouched = 77;

class CudaElementwise : public testing::GpuBesideCpu {};

// Rows of `dim` numbers in the middle of longer ones.
struct Out {
  Out(int64_t rows, int64_t dim) : rows(rows), dim(dim), values(rows * (dim + 5), kUntouched) {}
  View In(Travel& there) {
    return View::Matrix(there(values), DType::kF32, rows, dim + 5).Columns(2, dim);
  }
  int64_t rows, dim;
  std::vector<float> values;
};

std::vector<float> Embedded(Backend& backend, const testing::Weights& table,
                            std::vector<int32_t> tokens, float scale) {
  Out out(static_cast<int64_t>(tokens.size()), table.columns);
  Travel there(backend);
  const testing::PlacedWeights placed(backend, table.view());
  EmbedArgs args;
  args.table = placed.view;
  args.tokens = View::Vector(there(tokens), DType::kI32, out.rows);
  args.out = out.In(there);
  args.scale = scale;
  backend.Run(backend.ops().Embed, args);
  there.Home();
  return out.values;
}

TEST_F(CudaElementwise, EmbedEqualsTheCpus) {
  constexpr float kScale = 25.25f;
  std::mt19937 random(1);
  for (DType type : testing::kWeightTypes) {
    for (int64_t dim : {256, 768, 2560, 5376, 37, 1}) {
      if (dim % Info(type).block_elements != 0) continue;
      SCOPED_TRACE(std::string(Info(type).name) + " of " + std::to_string(dim));
      const testing::Weights table = testing::RandomWeights(type, 300, dim, random);
      std::vector<int32_t> tokens = {299, 0, 7, 7, 298, 0};
      for (int i = 0; i < 200; ++i) tokens.push_back(static_cast<int32_t>(random() % 300));
      const std::vector<float> want = Embedded(*cpu_, table, tokens, kScale),
                               got = Embedded(*gpu_, table, tokens, kScale);
      float largest = 0;
      for (float x : want) largest = x == kUntouched ? largest : std::max(largest, std::fabs(x));
      // Either is within ten roundings of the format's definition, see embed_test.cc.
      for (size_t i = 0; i < want.size(); ++i) {
        ASSERT_NEAR(got[i], want[i], want[i] == kUntouched ? 0 : 20 * 0x1p-24 * largest) << i;
      }
    }
  }
}

std::vector<float> Gathered(Backend& backend, std::vector<float> x, int64_t dim,
                            std::vector<int32_t> rows) {
  Out out(static_cast<int64_t>(rows.size()), dim);
  Travel there(backend);
  const auto from = static_cast<int64_t>(x.size()) / (dim + 3);
  const View source = View::Matrix(there(x), DType::kF32, from, dim + 3).Columns(1, dim);
  const View wanted = View::Vector(there(rows), DType::kI32, out.rows);
  backend.Run(backend.ops().Gather, {source, wanted, out.In(there)});
  there.Home();
  return out.values;
}

TEST_F(CudaElementwise, GatherEqualsTheCpusToTheBit) {
  std::mt19937 random(2);
  for (int64_t dim : {384, 640, 2560, 5376, 37, 1}) {
    const std::vector<float> x = RandomFloats(70 * (dim + 3), random);
    std::vector<int32_t> last = {69}, all(70), some = {3, 0, 69, 3, 3};
    for (int i = 0; i < 70; ++i) all[i] = 69 - i;
    for (const auto& rows : {last, all, some}) {
      EXPECT_EQ(Gathered(*gpu_, x, dim, rows), Gathered(*cpu_, x, dim, rows))
          << rows.size() << " rows of " << dim;
    }
  }
}

std::vector<float> Capped(Backend& backend, std::vector<float> x, int64_t rows, int64_t dim,
                          float cap) {
  Travel there(backend);
  const View all = View::Matrix(there(x), DType::kF32, rows, dim + 1);
  backend.Run(backend.ops().Softcap, {all.Columns(0, dim), cap});
  there.Home();
  return x;
}

TEST_F(CudaElementwise, SoftcapEqualsTheCpus) {
  std::mt19937 random(3);
  for (int64_t dim : {8192, 262144, 37, 1}) {
    for (int64_t rows : {1, 5}) {
      for (float cap : {30.0f, 1.5f}) {
        std::vector<float> x = RandomFloats(rows * (dim + 1), random);
        for (size_t i = 0; i < x.size(); ++i) x[i] *= i % 3 == 0 ? 1e-3f : 20;
        x[0] = 1e30f;
        const std::vector<float> want = Capped(*cpu_, x, rows, dim, cap),
                                 got = Capped(*gpu_, x, rows, dim, cap);
        // CUDA's tanhf is within 2 units in the last place, glibc's within 2; each is multiplied
        // once. A unit is 2^-23 of a number at most.
        for (size_t i = 0; i < x.size(); ++i) {
          ASSERT_NEAR(got[i], want[i], 5 * 0x1p-23 * std::fabs(want[i])) << dim << ", cap " << cap;
          if (static_cast<int64_t>(i) % (dim + 1) == dim) {
            ASSERT_EQ(got[i], x[i]) << "someone else's";
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace longspan
