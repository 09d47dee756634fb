// What a ring holds and for how long, through KvCache's public calls.
#include "engine/ring_cache.h"

#include "engine/kv_cache.h"
#include "gtest/gtest.h"
#include "tests/support/cache_case.h"

namespace longspan {
namespace {

class RingResidency : public ::testing::TestWithParam<int> {};

// 64 is a multiple of the page, so W tokens and a page are exactly 64 + 16.
TEST_P(RingResidency, IsTheWindowAndOnePageAtAnyChunkSize) {
  constexpr int kWindow = 64, kPage = 16, kTokens = 1500;
  TracedCache traced({{kWindow, 2, 8}}, kPage, 1 << 20, 1, 2000);
  const int64_t token_bytes = 2 * 2 * 8 * 4;
  const SequenceId sequence = traced.cache->Open();
  int64_t most = 0;
  for (int done = 0; done < kTokens;) {
    const int count = std::min(GetParam(), kTokens - done);
    ASSERT_TRUE(traced.Step(sequence, count));
    done += count;
    most = std::max(most, traced.cache->Usage().used_bytes);
    ASSERT_TRUE(traced.cache->CheckIntegrity().ok());
  }
  EXPECT_EQ(most, (kWindow + kPage) * token_bytes);
}

INSTANTIATE_TEST_SUITE_P(Chunks, RingResidency, ::testing::Values(1, 7, 64, 512, 1500));

TEST(Ring, HoldsTheWindowRoundedUpToPagesAndOnePage) {
  for (int window = 1; window < 200; ++window) {
    for (int page : {1, 2, 3, 7, 16, 64}) {
      const int slots = RingCache::SlotsOf(window, page);
      const int rounded = (window + page - 1) / page * page;
      EXPECT_LE(slots * page, rounded + page) << window << " " << page;
      // Any W consecutive positions lie in distinct rows, wherever they begin.
      for (int first = 0; first < page; ++first) {
        EXPECT_LE((first + window - 1) / page + 1, slots);
      }
      // And with one slot fewer some would not.
      EXPECT_GT((page - 1 + window - 1) / page + 1, slots - 1);
    }
  }
}

TEST(Ring, KeepsTheWindowAtItsEdgesWhateverTheChunks) {
  for (int window : {1, 2, 15, 16, 17, 33}) {
    for (int chunk : {1, 7, 15, 16, 17, 18, 64}) {
      TracedCache traced({{window, 1, 4}, {0, 1, 4}}, 16, 1 << 20, 1, 400);
      const SequenceId sequence = traced.cache->Open();
      for (int length : {window - 1, 1, 1, 16, chunk, chunk, chunk}) {
        if (length > 0) {
          ASSERT_TRUE(traced.Step(sequence, length)) << window << " " << chunk;
        }
      }
    }
  }
}

TEST(Ring, LayersOfDifferentWindowsShareTheLargestRing) {
  const CacheShape shape = ShapeOf(CacheSpec({{5, 1, 64}, {33, 1, 64}}), DType::kF32, 16);
  EXPECT_EQ(shape.window, 33);
  EXPECT_EQ(shape.ring_slots, 3);
  EXPECT_EQ(shape.ring_page_bytes, 2 * 16 * 2 * 64 * 4);
}

TEST(Ring, ADecodeStepOfAForkNeverCopiesAPageThatItOverwritesWhole) {
  constexpr int kPage = 4;
  TracedCache traced({{9, 1, 16}}, kPage, 1 << 20, 2, 400);
  const SequenceId parent = traced.cache->Open();
  ASSERT_TRUE(traced.Step(parent, 12));  // full pages only
  const SequenceId child = traced.Fork(parent);
  for (int i = 0; i < 40; ++i) ASSERT_TRUE(traced.Step(child, 1));
  EXPECT_EQ(traced.backend.copied_within, 0u);
  EXPECT_EQ(traced.cache->Usage().ring_pages_used, 6);  // each its own three by now
}

TEST(Ring, AForksChunkCopiesThePagesThatItsFirstQueriesStillRead) {
  constexpr int kPage = 4;
  TracedCache traced({{9, 1, 16}}, kPage, 1 << 20, 2, 400);
  const SequenceId parent = traced.cache->Open();
  ASSERT_TRUE(traced.Step(parent, 12));
  const SequenceId child = traced.Fork(parent);
  // Position 12 sees 4..11: the pages of 4..7 and 8..11, which the chunk overwrites, are read
  // first; that of 0..3 is not.
  ASSERT_TRUE(traced.Step(child, 12));
  EXPECT_EQ(traced.backend.copied_within, 2u * kPage * 2 * 16 * 4);
  ASSERT_TRUE(traced.Step(parent, 12));
}

}  // namespace
}  // namespace longspan
