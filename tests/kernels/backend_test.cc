#include "kernels/backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <cstring>

#include "kernels/cpu/simd.h"

namespace longspan {
namespace {

TEST(CpuBackend, NamesItsInstructionsAndThreads) {
  EXPECT_EQ(Backend::Cpu({.threads = 3, .simd = "portable"})->name(), "cpu (portable, 3 threads)");
  EXPECT_EQ(Backend::Cpu({.threads = 1, .simd = "portable"})->name(), "cpu (portable, 1 thread)");
  EXPECT_THAT(Backend::Cpu({})->name(), ::testing::HasSubstr(SimdName(BestSimd())));
}

TEST(CpuBackendDeathTest, RefusesInstructionsThatAreNotThere) {
  EXPECT_DEATH(Backend::Cpu({.simd = "mmx"}),
               "unknown simd 'mmx': use avx512_bf16, avx512, avx2, neon_dot, neon or portable");
  for (const Simd simd : kSimds) {
    if (MachineRuns(simd)) continue;
    const std::string name = SimdName(simd);
    EXPECT_DEATH(Backend::Cpu({.simd = name}), "cannot run simd '" + name + "'");
  }
}

TEST(CpuBackend, ChoosesTheBestSetOfAKnownProcessor) {
  const char* best = std::getenv("LONGSPAN_BEST_SIMD");
  if (best == nullptr) GTEST_SKIP() << "LONGSPAN_BEST_SIMD does not say which it is";
  EXPECT_STREQ(SimdName(BestSimd()), best);
}

TEST(CpuBackend, RoundsActivationsOnlyWhenToldTo) {
  EXPECT_NE(BestSimd(), Simd::kAvx512Bf16);
  for (Simd simd : kSimds) EXPECT_EQ(ParseSimd(SimdName(simd)), simd);
}

TEST(Roofline, HoldsAProductAgainstTheInstructionOfItsWeights) {
  const Roofline roofline = {1, 100, {{"BF16", 200}, {"Q4_K", 400}}};
  EXPECT_EQ(roofline.OperationsPerSecond(OpId::kMatMul, "BF16 384x960+960"), 200);
  EXPECT_EQ(roofline.OperationsPerSecond(OpId::kMatMul, "Q4_K 640x2048"), 400);
  EXPECT_EQ(roofline.OperationsPerSecond(OpId::kGatedMatMul, "Q4_K 640x2048+2048"), 400);
  EXPECT_EQ(roofline.OperationsPerSecond(OpId::kMatMul, "F32 640x2048"), 100);
  EXPECT_EQ(roofline.OperationsPerSecond(OpId::kAttention, "full"), 100);
}

TEST(CpuBackend, HasEveryOp) {
  const auto backend = Backend::Cpu({.threads = 1});
#define LONGSPAN_EXPECT_OP(name)                    \
  EXPECT_NE(backend->ops().name.function, nullptr); \
  EXPECT_EQ(backend->ops().name.id, OpId::k##name); \
  EXPECT_STREQ(OpName(backend->ops().name.id), #name);
  LONGSPAN_OPS(LONGSPAN_EXPECT_OP)
#undef LONGSPAN_EXPECT_OP
}

TEST(CpuBackend, AllocatesZeroedPages) {
  const auto backend = Backend::Cpu({.threads = 1});
  for (size_t bytes : {1, 4096, 100000, 4 << 20}) {
    Buffer buffer = backend->Allocate(bytes);
    ASSERT_EQ(buffer.bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % 4096, 0u);
    for (size_t i = 0; i < bytes; i += 511) EXPECT_EQ(buffer.data()[i], std::byte{0});
    buffer.data()[bytes - 1] = std::byte{1};
  }
  EXPECT_EQ(backend->Allocate(0).data(), nullptr);
}

TEST(CpuBackend, CopiesOverlappingMemory) {
  const auto backend = Backend::Cpu({.threads = 1});
  char text[] = "abcdefgh";
  backend->CopyWithin(text + 2, text, 5);
  EXPECT_STREQ(text, "ababcdeh");
}

TEST(CpuBackend, CountsCallsBytesAndFlops) {
  const auto backend = Backend::Cpu({.threads = 1, .simd = "portable"});
  std::vector<float> x(2 * 32, 1), w(6 * 32, 1), out(2 * 6);
  MatMulArgs args;
  args.x = View::Matrix(x.data(), DType::kF32, 2, 32);
  args.parts[0] = View::Matrix(w.data(), DType::kF32, 4, 32);
  args.parts[1] = View::Matrix(w.data(), DType::kF32, 2, 32);
  args.part_count = 2;
  args.out = View::Matrix(out.data(), DType::kF32, 2, 6);
  for (int i = 0; i < 3; ++i) backend->Run(backend->ops().MatMul, args);
  const OpTotals& totals = backend->Profile(OpId::kMatMul);
  EXPECT_EQ(totals.calls, 3);
  EXPECT_EQ(totals.flops, 3 * 2 * 2 * 6 * 32);
  EXPECT_EQ(totals.bytes, 3 * 4 * (2 * 32 + 6 * 32 + 2 * 6));
  EXPECT_GT(totals.nanoseconds, 0);
  EXPECT_EQ(backend->Profile(OpId::kEmbed).calls, 0);
}

TEST(CpuBackend, TellsTimedCallsApartByKind) {
  const auto backend = Backend::Cpu({.threads = 1, .simd = "portable"});
  std::vector<float> x(2 * 32, 1), w(6 * 32, 1), out(2 * 6);
  const auto multiply = [&](int64_t columns, int64_t more) {
    MatMulArgs args;
    args.x = View::Matrix(x.data(), DType::kF32, 2, 32);
    args.parts[0] = View::Matrix(w.data(), DType::kF32, columns, 32);
    args.parts[1] = View::Matrix(w.data(), DType::kF32, more, 32);
    args.part_count = more > 0 ? 2 : 1;
    args.out = View::Matrix(out.data(), DType::kF32, 2, columns + more);
    backend->Run(backend->ops().MatMul, args);
  };
  const OpTotals& totals = backend->Profile(OpId::kMatMul);
  multiply(4, 2);
  EXPECT_TRUE(backend->TimedOps().empty());
  const int64_t before = totals.nanoseconds;

  backend->TimeOps(true);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 3; ++i) multiply(4, 2);
  multiply(5, 0);
  const std::chrono::nanoseconds wall = std::chrono::steady_clock::now() - begin;
  backend->TimeOps(false);
  multiply(5, 0);
  OpCounts timed = backend->TimedOps();
  ASSERT_EQ(timed.size(), 2u);
  const OpCount three = timed[{OpId::kMatMul, "F32 32x4+2"}],
                one = timed[{OpId::kMatMul, "F32 32x5"}];
  EXPECT_EQ(three.calls, 3);
  EXPECT_EQ(three.flops, 3 * 2 * 2 * 6 * 32);
  EXPECT_EQ(three.bytes, 3 * 4 * (2 * 32 + 6 * 32 + 2 * 6));
  EXPECT_EQ(one.calls, 1);
  EXPECT_GT(one.nanoseconds, 0);
  EXPECT_LE(three.nanoseconds + one.nanoseconds, wall.count());
  EXPECT_EQ(totals.calls, 6);
  EXPECT_GT(totals.nanoseconds, before + three.nanoseconds + one.nanoseconds);

  backend->TimeOps(true);
  EXPECT_TRUE(backend->TimedOps().empty());
}

TEST(Kind, IsAttentionsWindow) {
  AttentionArgs args;
  EXPECT_EQ(KindOf(args), "full");
  args.window = 1024;
  EXPECT_EQ(KindOf(args), "window 1024");
  EXPECT_EQ(KindOf(GatherArgs()), "");
}

TEST(Cost, CountsTheBlocksOfQuantisedWeights) {
  MatMulArgs args;
  args.x = View::Matrix(nullptr, DType::kF32, 1, 256);
  args.parts[0] = View::Matrix(nullptr, DType::kQ4_K, 10, 256);
  args.out = View::Matrix(nullptr, DType::kF32, 1, 10);
  EXPECT_EQ(Cost(args).bytes, 1024 + 10 * 144 + 40);
  EXPECT_EQ(Cost(args).flops, 2 * 256 * 10);
}

// Counted one query and key at a time.
TEST(Cost, CountsTheKeysThatAttentionSees) {
  const int32_t row_begin[] = {0, 3, 4, 4, 24};
  const int32_t start[] = {0, 50, 9, 5};
  for (int window : {0, 1, 4, 8, 64}) {
    AttentionArgs args;
    args.query = args.out = View::Cube(nullptr, DType::kF32, 24, 6, 32);
    args.cache.kv_heads = 2;
    args.cache.head_dim = 32;
    args.cache.dtype = DType::kBF16;
    args.batch = {.sequences = 4, .rows = 24, .row_begin = row_begin, .start = start};
    args.window = window;
    int64_t pairs = 0, keys = 0;
    for (int s = 0; s < 4; ++s) {
      const int rows = row_begin[s + 1] - row_begin[s];
      for (int j = 0; j < start[s] + rows; ++j) {
        bool seen = false;
        for (int t = start[s]; t < start[s] + rows; ++t) {
          const bool sees = j <= t && (window == 0 || t - j < window);
          pairs += sees;
          seen |= sees;
        }
        keys += seen;
      }
    }
    EXPECT_EQ(Cost(args).flops, 4 * pairs * 6 * 32) << window;
    EXPECT_EQ(Cost(args).bytes, 2 * 4 * 24 * 6 * 32 + keys * 2 * 2 * 32 * 2) << window;
  }
}

}  // namespace
}  // namespace longspan
