// Times of single ops on the GPU, against the wall's clock and what no memory can do.
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace longspan {
namespace {

// More than a Hopper GPU reads; the matrix below is larger than any cache.
constexpr double kBytesPerSecond = 5e12;
constexpr int64_t kSide = 16384;

class CudaTiming : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    backend_ = Backend::Cuda({}, &why);
    ASSERT_NE(backend_, nullptr) << why;
    memory_ = backend_->Allocate(kSide * kSide * 2 + 2 * kSide * 4);
    ASSERT_NE(memory_.data(), nullptr);
    std::byte* vectors = memory_.data() + kSide * kSide * 2;
    product_.x = View::Matrix(vectors, DType::kF32, 1, kSide);
    product_.parts[0] = View::Matrix(memory_.data(), DType::kBF16, kSide, kSide);
    product_.out = View::Matrix(vectors + kSide * 4, DType::kF32, 1, kSide);
    tiny_ = {View::Matrix(vectors, DType::kF32, 1, 32), 1};
    Multiply();  // what a first use sets up is there
    Wait();
  }
  void Multiply() { backend_->Run(backend_->ops().MatMul, product_); }
  void Wait() {
    float any;
    backend_->CopyOut(&any, product_.out.data, sizeof(any));
    ASSERT_EQ(backend_->Fault(), "");
  }
  OpCount Timed(OpId op) const {
    OpCount sum;
    for (const auto& [key, count] : backend_->TimedOps()) {
      if (key.first == op) sum += count;
    }
    return sum;
  }
  static double LeastSeconds() { return kSide * kSide * 2 / kBytesPerSecond; }

  std::unique_ptr<Backend> backend_;
  Buffer memory_;
  MatMulArgs product_;
  SoftcapArgs tiny_;
};

TEST_F(CudaTiming, AProductTakesAtLeastItsReadingAndAtMostTheWallTimeAroundIt) {
  backend_->TimeOps(true);
  Wait();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 10; ++i) Multiply();
  Wait();
  const std::chrono::nanoseconds wall = std::chrono::steady_clock::now() - begin;
  const OpCount timed = Timed(OpId::kMatMul);
  EXPECT_EQ(timed.calls, 10);
  EXPECT_GE(timed.nanoseconds * 1e-9, 10 * LeastSeconds());
  EXPECT_LE(timed.nanoseconds, wall.count());
  EXPECT_EQ(backend_->TimedOps().count({OpId::kMatMul, "BF16 16384x16384"}), 1u);
}

TEST_F(CudaTiming, WhatIsRepeatedIsTimedToo) {
  const auto repeat = [&] { backend_->Repeat(7, [&] { Multiply(); }); };
  for (int i = 0; i < 3; ++i) repeat();  // issued, captured, replayed
  backend_->TimeOps(true);
  for (int i = 0; i < 3; ++i) repeat();
  backend_->TimeOps(false);
  EXPECT_EQ(Timed(OpId::kMatMul).calls, 3);
  EXPECT_GE(Timed(OpId::kMatMul).nanoseconds * 1e-9, 3 * LeastSeconds());
  repeat();  // its graph still serves
  Wait();
  EXPECT_EQ(Timed(OpId::kMatMul).calls, 3);
}

TEST_F(CudaTiming, EveryCallCountsHoweverManyThereAre) {
  constexpr int kCalls = 20000;  // more than have events at once
  const int64_t before = backend_->Profile(OpId::kSoftcap).calls;
  backend_->TimeOps(true);
  for (int i = 0; i < kCalls; ++i) backend_->Run(backend_->ops().Softcap, tiny_);
  backend_->TimeOps(false);
  EXPECT_EQ(Timed(OpId::kSoftcap).calls, kCalls);
  EXPECT_GT(Timed(OpId::kSoftcap).nanoseconds, 0);
  EXPECT_EQ(backend_->Profile(OpId::kSoftcap).calls, before + kCalls);
  EXPECT_EQ(backend_->Fault(), "");
}

// Of what one copy passes through, and of more.
TEST_F(CudaTiming, WhatIsCopiedOutLaterIsWhatLayThereBefore) {
  for (const size_t bytes : {size_t{4}, size_t{1} << 20, size_t{20} << 20}) {
    std::vector<std::byte> first(bytes, std::byte{1}), second(bytes, std::byte{2}), copy(bytes),
        next(bytes);
    backend_->CopyIn(memory_.data(), first.data(), bytes);
    backend_->CopyOutLater(copy.data(), memory_.data(), bytes);
    backend_->CopyIn(memory_.data(), second.data(), bytes);
    backend_->CopyOutLater(next.data(), memory_.data(), bytes);
    EXPECT_EQ(copy, first) << bytes;
    backend_->FinishCopyOut();
    backend_->FinishCopyOut();
    EXPECT_EQ(next, second) << bytes;
    EXPECT_EQ(copy, first) << bytes;
  }
}

}  // namespace
}  // namespace longspan
