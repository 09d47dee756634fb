// x made in the type that the product after it asks for, on every instruction set of this machine.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/support/simds.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using testing::PlacedWeights;
using testing::RandomFloats;
using testing::RandomWeights;

View Vector(std::vector<float>& v) { return View::Vector(v.data(), DType::kF32, v.size()); }
View Matrix(std::vector<float>& v, int64_t rows) {
  return View::Matrix(v.data(), DType::kF32, rows, v.size() / rows);
}

class ProductInput : public ::testing::TestWithParam<const char*> {
 protected:
  ProductInput() : backend_(Backend::Cpu({.threads = 2, .simd = GetParam()})) {}

  PlacedWeights Weights(DType type, int64_t rows, int64_t columns) {
    return PlacedWeights(*backend_, RandomWeights(type, rows, columns, random_).view());
  }

  // Of what the op that make(out) runs makes, in either type.
  template <class Make>
  void ExpectSameProduct(DType type, int64_t rows, int64_t in, const Make& make) {
    const PlacedWeights weights = Weights(type, 45, in);
    std::vector<float> floats(rows * 45), integers(rows * 45);
    for (std::vector<float>* out : {&floats, &integers}) {
      const DType dtype = out == &floats ? DType::kF32 : DType::kI8;
      std::vector<float> x(rows * in + 1, 77.0f);
      const MatMulArgs product = {.x = View::Matrix(x.data(), dtype, rows, in),
                                  .parts = {weights.view},
                                  .out = Matrix(*out, rows)};
      ASSERT_EQ(backend_->ProductInput(product), DType::kI8);
      make(product.x);
      backend_->Run(backend_->ops().MatMul, product);
      EXPECT_EQ(x.back(), 77.0f) << "beyond x";
    }
    EXPECT_EQ(0, std::memcmp(floats.data(), integers.data(), floats.size() * sizeof(float)))
        << Info(type).name << ", " << rows << " rows of " << in;
  }

  // test(type, rows, in) of rows of one block, and of longer ones, which the threads share.
  template <class Test>
  void ForEachShape(const Test& test) {
    for (DType type : kBlockTypes) {
      for (int64_t in : {Info(type).block_elements, 768}) {
        for (int64_t rows : {1, 3, 5, 33}) test(type, rows, in);
      }
    }
  }

  std::unique_ptr<Backend> backend_;
  std::mt19937 random_{1};
};
INSTANTIATE_TEST_SUITE_P(Simd, ProductInput, ::testing::ValuesIn(testing::RunnableSimds()));

TEST_P(ProductInput, IsOfIntegersWhereAllWeightsAreBlocksAndRowsFollowEachOther) {
  for (DType type : testing::kWeightTypes) {
    const PlacedWeights a = Weights(type, 5, 256), b = Weights(DType::kQ8_0, 3, 256),
                        c = Weights(DType::kBF16, 3, 256);
    MatMulArgs product = {.x = View::Matrix(nullptr, DType::kF32, 7, 256),
                          .parts = {a.view, b.view, c.view},
                          .out = View()};
    for (int parts : {1, 2}) {
      product.part_count = parts;
      EXPECT_EQ(backend_->ProductInput(product), IsQuantised(type) ? DType::kI8 : DType::kF32)
          << Info(type).name;
    }
    product.part_count = 3;
    EXPECT_EQ(backend_->ProductInput(product), DType::kF32) << Info(type).name;
    product.part_count = 1;
    product.x.stride[0] = 288;
    EXPECT_EQ(backend_->ProductInput(product), DType::kF32) << Info(type).name;
  }
}

TEST_P(ProductInput, GivesTheSameProductAsRmsNormsFloats) {
  ForEachShape([&](DType type, int64_t rows, int64_t in) {
    std::vector<float> x = RandomFloats(rows * in, random_), weight = RandomFloats(in, random_);
    ExpectSameProduct(type, rows, in, [&](const View& out) {
      backend_->Run(backend_->ops().RmsNorm, {Matrix(x, rows), Vector(weight), out});
    });
  });
}

TEST_P(ProductInput, GivesTheSameProductAsAddRmsNormsFloats) {
  ForEachShape([&](DType type, int64_t rows, int64_t in) {
    std::vector<float> x = RandomFloats(rows * in, random_), sum = RandomFloats(rows * in, random_);
    std::vector<float> post = RandomFloats(in, random_), next = RandomFloats(in, random_);
    std::vector<float> residual, of_floats;
    ExpectSameProduct(type, rows, in, [&](const View& out) {
      of_floats = residual;
      residual = sum;
      backend_->Run(backend_->ops().AddRmsNorm,
                    {Matrix(x, rows), Vector(post), Matrix(residual, rows), Vector(next), out});
    });
    EXPECT_EQ(residual, of_floats);
  });
}

// Of a gated product that takes its own x so, too.
TEST_P(ProductInput, GivesTheSameProductAsGatedMatMulsFloats) {
  ForEachShape([&](DType type, int64_t rows, int64_t in) {
    const PlacedWeights gate = Weights(type, in, 256), up = Weights(type, in, 256);
    std::vector<float> x = RandomFloats(rows * 256, random_), weight(256, 0.25f);
    std::vector<float> normed(rows * 256), gate_up(rows * 2 * in);
    ExpectSameProduct(type, rows, in, [&](const View& out) {
      const MatMulArgs product = {.x = View::Matrix(normed.data(), out.dtype, rows, 256),
                                  .parts = {gate.view, up.view},
                                  .part_count = 2,
                                  .out = Matrix(gate_up, rows)};
      backend_->Run(backend_->ops().RmsNorm, {Matrix(x, rows), Vector(weight), product.x});
      backend_->Run(backend_->ops().GatedMatMul, {product, out, Activation::kGeluTanh});
    });
  });
}

}  // namespace
}  // namespace longspan
