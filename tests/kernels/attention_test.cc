// Attention on the CPU against the eager answer, and the laws that chunking, batching and threads
// obey.
#include <gtest/gtest.h>

#include "tests/support/attention_expect.h"
#include "tests/support/simds.h"

namespace longspan {
namespace {

using testing::AttentionCase;

// fp32 sums of up to 1,500 products of unit normals against doubles.
constexpr double kTolerance = 2e-5;
// The project's bound is 1e-3; the CPU adds a block's 64 keys in floats, blocks in doubles.
constexpr double kSpanTolerance = 1e-5;

void ExpectEqualsEager(const AttentionCase& c, int every = 1) {
  testing::ExpectEqualsEager(c, kTolerance, every);
}
void ExpectSpansEqualEager(const AttentionCase& c, const std::vector<ProbeRange>& probes,
                           int every) {
  testing::ExpectSpansEqualEager(c, probes, kSpanTolerance, every);
}

class AttentionOnEachSimd : public ::testing::TestWithParam<const char*> {
 protected:
  AttentionOnEachSimd() : backend_(Backend::Cpu({.threads = 2, .simd = GetParam()})) {}
  std::unique_ptr<Backend> backend_;
};
INSTANTIATE_TEST_SUITE_P(Simd, AttentionOnEachSimd, ::testing::ValuesIn(testing::RunnableSimds()));

TEST_P(AttentionOnEachSimd, FullEqualsEager) {
  for (int dim : {4, 12, 64, 80, 256}) {
    AttentionCase c({.heads = 4, .kv_heads = 2, .dim = dim}, {130, 1, 65});
    c.RunAll(*backend_, 48);
    ExpectEqualsEager(c);
  }
}

TEST_P(AttentionOnEachSimd, OverQ8_0EqualsEagerOverItsNumbers) {
  for (int dim : {32, 64, 96, 256}) {
    for (int window : {0, 40}) {
      AttentionCase c({.dim = dim, .window = window, .dtype = DType::kQ8_0}, {130, 1, 65});
      c.RunAll(*backend_, 48);
      ExpectEqualsEager(c);
    }
  }
}

TEST_P(AttentionOnEachSimd, WindowEqualsMaskedFullAttentionAtItsEdges) {
  // Lengths W - 1, W, W + 1, W + page and far beyond.
  for (int window : {1, 2, 16, 17, 64, 100}) {
    AttentionCase c({.window = window},
                    {std::max(1, window - 1), window, window + 1, window + 16, 3 * window + 7});
    for (int chunk : {1, 7, 64}) {
      c.RunAll(*backend_, chunk);
      ExpectEqualsEager(c);
    }
  }
}

TEST_P(AttentionOnEachSimd, SoftcapAndSinksEqualEager) {
  for (int window : {0, 24}) {
    AttentionCase c({.window = window, .softcap = 2.0f, .sinks = true}, {90, 33});
    c.RunAll(*backend_, 20);
    ExpectEqualsEager(c);
  }
}

TEST_P(AttentionOnEachSimd, EveryGroupSizeEqualsEager) {
  for (int kv_heads : {1, 2, 3, 6}) {
    AttentionCase c({.heads = 6, .kv_heads = kv_heads, .dtype = DType::kF32}, {77});
    c.RunAll(*backend_, 13);
    ExpectEqualsEager(c);
  }
}

TEST_P(AttentionOnEachSimd, SeveralSegmentsEqualEager) {
  AttentionCase c({.heads = 2, .kv_heads = 1, .dim = 8}, {2500});
  c.RunAll(*backend_, 700);
  ExpectEqualsEager(c, 97);
}

TEST_P(AttentionOnEachSimd, ChunkingChangesNoBit) {
  for (DType dtype : {DType::kBF16, DType::kQ8_0}) {
    for (int window : {0, 40}) {
      AttentionCase c({.dim = 32, .window = window, .dtype = dtype}, {700, 150});
      c.RunAll(*backend_, 1000);
      const auto whole = c.out();
      for (int chunk : {1, 7, 64, 512}) {
        c.RunAll(*backend_, chunk);
        EXPECT_EQ(c.out(), whole) << Info(dtype).name << " window " << window << " chunk " << chunk;
      }
    }
  }
}

TEST_P(AttentionOnEachSimd, ARingEqualsMaskedFullAttentionOverRandomChunks) {
  for (uint32_t seed = 1; seed <= 6; ++seed) {
    std::mt19937 random(seed);
    const int window = 1 + static_cast<int>(random() % 70);
    AttentionCase c({.heads = 3, .kv_heads = 1, .dim = 8, .window = window}, {600, 350}, seed);
    std::vector<int> left = c.lengths();
    while (left[0] + left[1] > 0) {
      std::vector<int> counts(2);
      for (int s = 0; s < 2; ++s) {
        const int chunk = random() % 3 == 0 ? 1 : static_cast<int>(random() % 150);
        counts[s] = std::min(left[s], chunk);
        left[s] -= counts[s];
      }
      if (counts[0] + counts[1] > 0) c.Step(*backend_, counts, false);
    }
    ExpectEqualsEager(c, 7);
  }
}

TEST_P(AttentionOnEachSimd, NeighboursAndThreadsChangeNoBit) {
  AttentionCase together({.heads = 2, .kv_heads = 1}, {2200, 70}, 5);
  together.RunAll(*backend_, 2200);
  const auto both = together.out();
  const auto single = Backend::Cpu({.threads = 1, .simd = GetParam()});
  together.Rewind();
  together.Step(*single, {2200, 0}, false);
  EXPECT_EQ(together.out()[0], both[0]);
  // A long decode is split over threads: token by token from 2,190.
  const auto four = Backend::Cpu({.threads = 4, .simd = GetParam()});
  together.Rewind();
  together.Step(*single, {2190, 0}, false);
  for (int i = 0; i < 10; ++i) together.Step(*four, {1, 0}, false);
  EXPECT_EQ(together.out()[0], both[0]);
}

TEST_P(AttentionOnEachSimd, ObservingChangesNoBit) {
  AttentionCase c({.window = 24}, {100});
  c.RunAll(*backend_, 30);
  const auto plain = c.out();
  c.RunAll(*backend_, 30, /*observe=*/true);
  EXPECT_EQ(c.out(), plain);
}

TEST_P(AttentionOnEachSimd, StoringOneRowEachBeforeItChangesNoBit) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kQ8_0}) {
    testing::ExpectStoringFirstChangesNoBit(*backend_, {.dim = 32, .dtype = dtype});
  }
}

// --- Spans ---------------------------------------------------------------------------------------

TEST_P(AttentionOnEachSimd, SpansEqualTheEagerReferenceInAnyChunks) {
  const std::vector<ProbeRange> probes = {{10, 17}, {40, 41}};
  for (int window : {0, 24}) {
    for (bool extras : {false, true}) {
      AttentionCase c(
          {.window = window, .softcap = extras ? 3.0f : 0, .sinks = extras, .far_window = 24},
          {110, 60});
      for (int chunk : {1, 7, 64, 200}) {
        c.RunAll(*backend_, chunk, /*observe=*/true, probes);
        ExpectSpansEqualEager(c, probes, 3);
      }
    }
  }
}

TEST_P(AttentionOnEachSimd, SpansOfABatchOf64EqualTheEagerReference) {
  std::vector<int> lengths;
  for (int s = 0; s < 64; ++s) lengths.push_back(5 + s);
  AttentionCase c({.heads = 2, .kv_heads = 1, .dim = 8}, lengths);
  c.RunAll(*backend_, 1, /*observe=*/true);
  ExpectSpansEqualEager(c, {}, 5);
}

TEST_P(AttentionOnEachSimd, SpansSurviveTheMergeOfSegments) {
  AttentionCase c({.heads = 2, .kv_heads = 1, .dim = 8, .far_window = 64}, {2300});
  c.RunAll(*backend_, 2300, /*observe=*/true, {{1000, 1100}});
  ExpectSpansEqualEager(c, {{1000, 1100}}, 191);
}

TEST_P(AttentionOnEachSimd, MassByDistanceAddsUpToOne) {
  AttentionCase c({.window = 0}, {300});
  c.RunAll(*backend_, 64, /*observe=*/true);
  for (const SpanRecord& r : c.records()[0]) {
    double sum = 0;
    for (float mass : r.mass_by_distance) sum += mass;
    ASSERT_NEAR(sum, 1.0, 1e-5);
  }
}

}  // namespace
}  // namespace longspan
