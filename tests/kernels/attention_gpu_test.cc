// Attention on the GPU against the eager answer, and the laws that chunking and batching obey there
// too: among kernels of one choice, and on a deterministic backend always.
#include "tests/support/attention_expect.h"

namespace longspan {
namespace {

using testing::AttentionCase;
using testing::AttentionShape;

// fp32 sums of up to 2,500 products of unit normals, exponentials within 2 ulp, against doubles;
// tiles keep 16 bits of queries and probabilities, 2^-17 of scores of up to 8.
constexpr double kTolerance = 5e-5;
// The project's bound for every span.
constexpr double kSpanTolerance = 1e-3;

class CudaAttention : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string why;
    backend_ = Backend::Cuda({}, &why).release();
    CHECK(backend_ != nullptr) << why;
  }
  static void TearDownTestSuite() { delete backend_; }
  static Backend* backend_;
};
Backend* CudaAttention::backend_ = nullptr;

TEST_F(CudaAttention, FullEqualsEagerAtEveryHeadSize) {
  for (int dim : {4, 12, 33, 64, 80, 96, 128, 256}) {
    SCOPED_TRACE(dim);
    AttentionCase c({.heads = 4, .kv_heads = 2, .dim = dim}, {130, 1, 65});
    c.RunAll(*backend_, 48);
    testing::ExpectEqualsEager(c, kTolerance);
  }
}

TEST_F(CudaAttention, WindowEqualsMaskedFullAttentionAtItsEdges) {
  for (int window : {1, 2, 16, 17, 64, 100}) {
    AttentionCase c({.window = window},
                    {std::max(1, window - 1), window, window + 1, window + 16, 3 * window + 7});
    for (int chunk : {1, 7, 64, 1000}) {
      c.RunAll(*backend_, chunk);
      testing::ExpectEqualsEager(c, kTolerance);
    }
  }
}

TEST_F(CudaAttention, SoftcapAndSinksEqualEager) {
  for (int window : {0, 24}) {
    AttentionCase c({.window = window, .softcap = 2.0f, .sinks = true}, {90, 33});
    c.RunAll(*backend_, 20);
    testing::ExpectEqualsEager(c, kTolerance);
  }
}

TEST_F(CudaAttention, EveryGroupSizeEqualsEager) {
  for (int kv_heads : {1, 2, 3, 6}) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      AttentionCase c({.heads = 6, .kv_heads = kv_heads, .dtype = dtype}, {77, 16});
      for (int chunk : {13, 40}) {  // fewer rows than a tile takes, and more
        c.RunAll(*backend_, chunk);
        testing::ExpectEqualsEager(c, kTolerance);
      }
    }
  }
}

// Rows are attended for 8 query heads of a KV head at a time.
TEST_F(CudaAttention, GroupsOfMoreThanEightHeadsEqualEager) {
  for (int dim : {64, 80, 128, 256}) {
    AttentionCase c({.heads = 20, .kv_heads = 2, .dim = dim, .softcap = 3.0f}, {150, 16});
    c.RunAll(*backend_, 5);
    testing::ExpectEqualsEager(c, kTolerance, 7);
  }
}

TEST_F(CudaAttention, PagesOfAnySizeEqualEager) {
  for (int page_tokens : {1, 3, 8, 64, 100}) {
    for (int window : {0, 37}) {
      AttentionCase c({.dim = 64, .window = window, .page_tokens = page_tokens}, {290, 41});
      c.RunAll(*backend_, 9);
      testing::ExpectEqualsEager(c, kTolerance, 5);
    }
  }
}

// Rows of any length side by side, so that shares of all their keys begin and end anywhere.
TEST_F(CudaAttention, ManySequencesThatDecodeEqualEager) {
  constexpr int kEvery = 97;
  std::vector<int> lengths, most;
  for (int i = 0; i < 150; ++i) {
    lengths.push_back(1 + i % 7 * kEvery);
    if (i % 50 == 3) lengths.back() = 1 + 18 * kEvery;
    most.push_back(lengths.back() - 1);
  }
  for (const auto& [heads, dim] : {std::pair{4, 64}, {20, 128}, {4, 256}}) {
    AttentionCase c({.heads = heads, .kv_heads = 2, .dim = dim}, lengths);
    c.Step(*backend_, most, false);
    c.Step(*backend_, std::vector<int>(lengths.size(), 1), false);
    testing::ExpectEqualsEager(c, kTolerance, kEvery);
  }
}

// More rows than are attended at once.
TEST_F(CudaAttention, ThousandsOfRowsOfAStepEqualEager) {
  std::vector<int> lengths(1100, 2), most(1100, 0);
  for (int i : {0, 500, 1023, 1024, 1099}) lengths[i] = 1 + 1200;
  for (size_t i = 0; i < lengths.size(); ++i) most[i] = lengths[i] - 1;
  AttentionCase c({.heads = 2, .kv_heads = 1, .dim = 8}, lengths);
  c.Step(*backend_, most, false);
  c.Step(*backend_, std::vector<int>(lengths.size(), 1), false);
  testing::ExpectLastRowsEqualEager(c, kTolerance);
}

// From strands of keys so few that each is cut for several blocks to more than have room at once.
TEST_F(CudaAttention, WindowsOfFewAndOfManySequencesEqualEager) {
  struct Shape {
    int sequences, window, dim;
  };
  for (const Shape& shape :
       {Shape{4, 1024, 256}, {36, 1024, 256}, {70, 1000, 128}, {140, 1024, 64}, {300, 128, 64}}) {
    SCOPED_TRACE(::testing::Message() << shape.sequences << " of " << shape.window);
    std::vector<int> lengths, most;
    for (int i = 0; i < shape.sequences; ++i) {
      lengths.push_back(i % 4 == 3 ? 2 : shape.window + 1 + 30 * (i % 3));
      most.push_back(lengths.back() - 1);
    }
    AttentionCase c({.heads = 2, .kv_heads = 1, .dim = shape.dim, .window = shape.window}, lengths);
    c.Step(*backend_, most, false);
    c.Step(*backend_, std::vector<int>(lengths.size(), 1), false);
    testing::ExpectLastRowsEqualEager(c, kTolerance);
  }
}

TEST_F(CudaAttention, SplitRowsEqualEager) {
  for (int dim : {8, 128, 256}) {
    AttentionCase c({.heads = 2, .kv_heads = 1, .dim = dim}, {2500});
    c.Step(*backend_, {2489}, false);
    c.Step(*backend_, {11}, false);
    testing::ExpectEqualsEager(c, kTolerance,
                               19);  // 2489 = 131 * 19, the first split row, among them
  }
}

// Chunks of 16 rows and more are attended in tiles, smaller ones row by row: on Hopper, whose names
// begin with H, rows that see so few keys by clusters, elsewhere in shares that only keep rounding.
TEST_F(CudaAttention, ChunkingChangesNoBitAmongTilesNorAmongRows) {
  const bool clusters = backend_->name().find("NVIDIA H") != std::string::npos;
  for (int window : {0, 40}) {
    AttentionCase c({.window = window}, {700, 150});
    const auto RunWith = [&](int chunk) {
      c.RunAll(*backend_, chunk);
      testing::ExpectEqualsEager(c, kTolerance, 13);
      return c.out();
    };
    const auto tiles = RunWith(1000), rows = RunWith(1);
    for (int chunk : {64, 512}) EXPECT_EQ(RunWith(chunk), tiles) << window << " " << chunk;
    for (int chunk : {7, 15}) {
      const auto out = RunWith(chunk);
      if (clusters) {
        EXPECT_EQ(out, rows) << window << " " << chunk;
      }
    }
  }
}

TEST_F(CudaAttention, MixedStepsOfRowsAndTilesEqualEager) {
  AttentionCase c({.heads = 6, .kv_heads = 2, .dim = 64}, {60, 200, 61, 16, 33});
  c.Step(*backend_, {59, 100, 60, 0, 0}, false);
  c.Step(*backend_, {1, 100, 1, 16, 15}, false);
  c.Step(*backend_, {0, 0, 0, 0, 18}, false);
  testing::ExpectEqualsEager(c, kTolerance);
}

TEST_F(CudaAttention, NeighboursChangeNoBit) {
  AttentionCase c({.heads = 2, .kv_heads = 1}, {1200, 70}, 5);
  c.RunAll(*backend_, 1200);
  const auto both = c.out();
  c.Rewind();
  c.Step(*backend_, {1200, 0}, false);
  EXPECT_EQ(c.out()[0], both[0]);
}

TEST_F(CudaAttention, StoringOneRowEachBeforeItChangesNoBit) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int dim : {16, 33, 256}) {
      testing::ExpectStoringFirstChangesNoBit(*backend_, {.dim = dim, .dtype = dtype});
    }
  }
}

TEST_F(CudaAttention, OfFewRowsABf16OutIsTheF32OneRounded) {
  for (int dim : {4, 33, 64, 80, 256}) {
    for (DType cache : {DType::kF32, DType::kBF16}) {
      for (int chunk : {1, 7}) {
        AttentionShape shape{.dim = dim, .sinks = dim == 64, .dtype = cache};
        const auto run = [&](DType out) {
          shape.out = out;
          AttentionCase c(shape, {90, 1, 300});
          c.RunAll(*backend_, chunk);
          return c.out();
        };
        auto want = run(DType::kF32);
        for (std::vector<float>& sequence : want) {
          for (float& x : sequence) x = FromBf16(ToBf16(x));
        }
        EXPECT_EQ(run(DType::kBF16), want) << "heads of " << dim << ", chunks of " << chunk;
      }
    }
  }
}

// With a BF16 out, tiles may round queries and probabilities to it as well, to 2^-9 of each. Scores
// are sums of `dim` products of normals, scaled to a deviation of 1.5, so theirs are off by at most
// some 6 deviations of 1.5 * 2^-9 / sqrt(3), that is 0.01; so are probabilities, relatively, and
// answers of values of up to 4.5, whose own rounding adds 2^-9 of them.
constexpr double kHalfTolerance = 0.03;

TEST_F(CudaAttention, OfManyRowsABf16OutEqualsEager) {
  for (int dim : {64, 80, 96, 128, 256}) {
    for (int window : {0, 1, 64, 100, 130}) {
      for (const auto& [heads, kv_heads] : {std::pair{4, 2}, {6, 1}, {2, 2}}) {
        SCOPED_TRACE(::testing::Message() << dim << " " << window << " " << heads);
        AttentionCase c({.heads = heads,
                         .kv_heads = kv_heads,
                         .dim = dim,
                         .window = window,
                         .softcap = window == 64 ? 2.0f : 0.0f,
                         .sinks = window == 100,
                         .out = DType::kBF16},
                        {330, 16, 129, 1});
        for (int chunk : {64, 1000}) {
          c.RunAll(*backend_, chunk);
          testing::ExpectEqualsEager(c, kHalfTolerance, 3);
        }
      }
    }
  }
}

// Late keys weigh more than 2^16 times what the first ones do.
TEST_F(CudaAttention, ScoresThatGrowEqualEager) {
  constexpr float kGrowth = 1.0f / 200;
  for (int dim : {64, 128, 256}) {
    for (int window : {0, 300}) {
      for (bool sinks : {false, true}) {
        AttentionCase c(
            {.dim = dim, .window = window, .sinks = sinks, .out = DType::kBF16, .growth = kGrowth},
            {704, 160});
        c.RunAll(*backend_, 352);
        testing::ExpectEqualsEager(c, (1 + kGrowth * 704) * kHalfTolerance, 7);
      }
    }
  }
}

TEST_F(CudaAttention, OfManyRowsPagesOfAnySizeEqualEager) {
  for (int page_tokens : {1, 8, 24, 48, 256}) {
    for (int window : {0, 37, 150}) {
      for (int dim : {80, 128, 256}) {
        SCOPED_TRACE(::testing::Message() << page_tokens << " " << window << " " << dim);
        AttentionCase c(
            {.dim = dim, .window = window, .page_tokens = page_tokens, .out = DType::kBF16},
            {590, 41});
        c.RunAll(*backend_, 100);
        testing::ExpectEqualsEager(c, kHalfTolerance, 5);
      }
    }
  }
}

TEST_F(CudaAttention, ChunkingChangesNoBitOfABf16OutInTiles) {
  for (int dim : {64, 128, 256}) {
    for (int window : {0, 40, 300}) {
      for (float growth : {0.0f, 0.005f, 0.2f}) {  // the last: by more than fp32 has room for
        AttentionCase c({.dim = dim, .window = window, .out = DType::kBF16, .growth = growth},
                        {704, 160});
        c.RunAll(*backend_, 1000);
        const auto whole = c.out();
        for (const auto& sequence : whole) {
          EXPECT_TRUE(std::all_of(sequence.begin(), sequence.end(),
                                  [](float x) { return std::isfinite(x); }));
        }
        for (int chunk : {16, 32, 352}) {
          c.RunAll(*backend_, chunk);
          EXPECT_EQ(c.out(), whole) << dim << " " << window << " " << growth << " " << chunk;
        }
      }
    }
  }
}

TEST_F(CudaAttention, LongContextsInTilesWithABf16OutEqualEager) {
  for (int dim : {64, 128, 256}) {
    for (int window : {0, 1024}) {
      AttentionCase c({.heads = 2,
                       .kv_heads = 1,
                       .dim = dim,
                       .window = window,
                       .page_tokens = 64,
                       .out = DType::kBF16},
                      {5000});
      c.RunAll(*backend_, 1024);
      testing::ExpectEqualsEager(c, kHalfTolerance, 97);
    }
  }
}

TEST_F(CudaAttention, SpansOfRowsWithABf16OutEqualEager) {
  for (bool sinks : {false, true}) {
    AttentionCase c({.heads = 2, .kv_heads = 1, .dim = 64, .sinks = sinks, .out = DType::kBF16},
                    {700});
    c.RunAll(*backend_, 250, /*observe=*/true, {{300, 400}});
    testing::ExpectSpansEqualEager(c, {{300, 400}}, kSpanTolerance, 41);
  }
}

TEST_F(CudaAttention, SpansEqualEager) {
  const std::vector<ProbeRange> probes = {{3, 9}, {20, 21}};
  for (int window : {0, 24}) {
    for (bool sinks : {false, true}) {
      AttentionCase c({.heads = 4, .kv_heads = 2, .window = window, .sinks = sinks}, {90, 40});
      for (int chunk : {1, 33}) {
        c.RunAll(*backend_, chunk, /*observe=*/true, probes);
        testing::ExpectSpansEqualEager(c, probes, kSpanTolerance, 3);
      }
    }
  }
  AttentionCase c({.heads = 2, .kv_heads = 1, .dim = 64}, {1500});
  c.RunAll(*backend_, 500, /*observe=*/true, {{1000, 1100}});
  testing::ExpectSpansEqualEager(c, {{1000, 1100}}, kSpanTolerance, 191);
}

TEST_F(CudaAttention, SpansOfAGraphsLayersEqualEager) {
  const std::vector<ProbeRange> probes = {{3, 9}, {20, 21}};
  for (int window : {0, 24}) {
    for (int layers : {3, 130}) {  // the latter: more than one kernel makes records of
      AttentionCase c({.heads = 4, .kv_heads = 2, .window = window, .sinks = true},
                      {layers > 3 ? 30 : 300, 21});
      c.graph_layers = layers;
      c.RunAll(*backend_, 1, /*observe=*/true, probes);
      testing::ExpectEqualsEager(c, kTolerance, 3);
      testing::ExpectSpansEqualEager(c, probes, kSpanTolerance, 3);
    }
  }
}

TEST_F(CudaAttention, SpansOfLongRowsEqualEager) {
  const std::vector<ProbeRange> probes = {{2000, 2100}};
  for (const int window : {0, 1024}) {
    AttentionCase c({.heads = 2, .kv_heads = 1, .dim = 256, .window = window}, {5001});
    c.Step(*backend_, {5000}, /*observe=*/true, probes);
    c.Step(*backend_, {1}, /*observe=*/true, probes);
    testing::ExpectSpansEqualEager(c, probes, kSpanTolerance, 1000);
  }
}

TEST_F(CudaAttention, ObservingChangesNoBit) {
  AttentionCase c({.window = 24}, {100});
  c.RunAll(*backend_, 30);
  const auto plain = c.out();
  c.RunAll(*backend_, 30, /*observe=*/true);
  EXPECT_EQ(c.out(), plain);
}

class DeterministicAttention : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    backend_ = Backend::Cuda({.deterministic = true}, &why);
    ASSERT_NE(backend_, nullptr) << why;
  }

  // The case's answer in these chunks, which is eager's, is the same to the bit in all of them.
  void ExpectChunkingChangesNoBit(AttentionCase& c, const std::vector<int>& chunks, int every) {
    std::vector<std::vector<float>> first;
    for (const int chunk : chunks) {
      c.RunAll(*backend_, chunk);
      testing::ExpectEqualsEager(c, kTolerance, every);
      if (first.empty()) first = c.out();
      ASSERT_EQ(c.out(), first) << "heads of " << c.shape().dim << ", window " << c.shape().window
                                << ", chunks of " << chunk << " and " << chunks[0];
    }
  }

  std::unique_ptr<Backend> backend_;
};

TEST_F(DeterministicAttention, ChunkingChangesNoBitAtAnyHeadSize) {
  for (const int dim : {8, 64, 80, 96, 128, 256}) {
    AttentionCase c({.dim = dim}, {700, 150});
    ExpectChunkingChangesNoBit(c, {1, 7, 15, 16, 64, 1000}, 13);
  }
}

// 256 keys are a split.
TEST_F(DeterministicAttention, ChunkingChangesNoBitAtTheEdgesOfWindowsAndSplits) {
  for (const int window : {1, 2, 40, 255, 256, 257, 300}) {
    AttentionCase c({.heads = 2, .kv_heads = 1, .window = window},
                    {255, 256, 257, 600, std::max(1, window - 1), window + 16});
    ExpectChunkingChangesNoBit(c, {1, 15, 64, 1000}, 17);
  }
}

TEST_F(DeterministicAttention, ChunkingChangesNoBitWithSoftcapAndSinks) {
  for (const int window : {0, 24, 270}) {
    for (const float softcap : {0.0f, 2.0f}) {
      AttentionCase c({.dim = 64, .window = window, .softcap = softcap, .sinks = true}, {590, 33});
      ExpectChunkingChangesNoBit(c, {1, 7, 16, 1000}, 19);
    }
  }
}

TEST_F(DeterministicAttention, ChunkingChangesNoBitInAnyGroup) {
  for (const int kv_heads : {1, 2, 6}) {
    AttentionCase c({.heads = 6, .kv_heads = kv_heads, .dim = 64}, {301, 16});
    ExpectChunkingChangesNoBit(c, {1, 13, 40, 1000}, 7);
  }
  AttentionCase more_heads_than_a_tile_has_rows({.heads = 72, .kv_heads = 1}, {300, 1});
  ExpectChunkingChangesNoBit(more_heads_than_a_tile_has_rows, {1, 40, 1000}, 50);
}

// Row by row at any number of rows.
TEST_F(DeterministicAttention, ChunkingChangesNoBitWhereTilesDoNotFit) {
  AttentionCase odd({.dim = 33}, {300, 40}), wide({.dtype = DType::kF32}, {300, 40});
  for (AttentionCase* c : {&odd, &wide}) ExpectChunkingChangesNoBit(*c, {1, 16, 64, 1000}, 9);
}

// The splits of 2,500 rows at once are more than the workspace holds; those of 8 are not.
TEST_F(DeterministicAttention, SplitsInTurnAreThoseAtOnce) {
  for (const int window : {0, 1300}) {
    AttentionCase c({.heads = 16, .kv_heads = 2, .dim = 256, .window = window}, {2500});
    c.Step(*backend_, {2500}, false);
    testing::ExpectEqualsEager(c, kTolerance, 311);
    const auto whole = c.out();
    c.Rewind();
    for (const int count : {1, 255, 1700, 536, 7, 1}) c.Step(*backend_, {count}, false);
    EXPECT_EQ(c.out(), whole);
  }
}

TEST_F(DeterministicAttention, NeighboursChangeNoBit) {
  for (const int window : {0, 300}) {
    AttentionCase c({.heads = 4, .kv_heads = 2, .dim = 64, .window = window},
                    {700, 1, 300, 64, 16, 15, 900}, 5);
    c.RunAll(*backend_, 1000);
    const auto together = c.out();
    for (size_t s = 0; s < c.lengths().size(); ++s) {
      c.Rewind();
      std::vector<int> counts(c.lengths().size());
      for (int left = c.lengths()[s]; left > 0; left -= counts[s]) {
        counts[s] = std::min(left, 130);
        c.Step(*backend_, counts, false);
      }
      EXPECT_EQ(c.out()[s], together[s]) << s;
    }
    c.Rewind();  // most decode, one reads
    c.Step(*backend_, {690, 0, 290, 60, 10, 5, 700}, false);
    for (int i = 0; i < 4; ++i) c.Step(*backend_, {1, i == 2, 1, 1, 1, 1, 50}, false);
    c.Step(*backend_, {6, 0, 6, 0, 2, 6, 0}, false);
    EXPECT_EQ(c.out()[0], together[0]);
    EXPECT_EQ(c.out()[1], together[1]);
    EXPECT_EQ(c.out()[2], together[2]);
  }
}

TEST_F(DeterministicAttention, StoringOneRowEachBeforeItChangesNoBit) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    testing::ExpectStoringFirstChangesNoBit(*backend_, {.dim = 64, .dtype = dtype});
    testing::ExpectStoringFirstChangesNoBit(*backend_,
                                            {.dim = 64, .dtype = dtype, .out = DType::kBF16});
  }
}

TEST_F(DeterministicAttention, ABf16OutIsTheF32OneRounded) {
  for (const int chunk : {1, 300}) {
    AttentionShape shape{.dim = 80, .sinks = true};
    AttentionCase wide(shape, {90, 300});
    wide.RunAll(*backend_, chunk);
    auto want = wide.out();
    for (std::vector<float>& sequence : want) {
      for (float& x : sequence) x = FromBf16(ToBf16(x));
    }
    shape.out = DType::kBF16;
    AttentionCase narrow(shape, {90, 300});
    narrow.RunAll(*backend_, chunk);
    EXPECT_EQ(narrow.out(), want) << chunk;
  }
}

TEST_F(DeterministicAttention, SpansEqualEager) {
  const std::vector<ProbeRange> probes = {{3, 9}, {270, 290}};
  for (const int window : {0, 24}) {
    AttentionCase c({.heads = 4, .kv_heads = 2, .window = window, .sinks = true}, {400, 40});
    for (const int chunk : {1, 33}) {
      c.RunAll(*backend_, chunk, /*observe=*/true, probes);
      testing::ExpectSpansEqualEager(c, probes, kSpanTolerance, 23);
    }
  }
}

}  // namespace
}  // namespace longspan
