#include "engine/page_pool.h"

#include <map>
#include <set>

#include "gtest/gtest.h"
#include "kernels/kv_view.h"
#include "tests/support/cache_case.h"
#include "tests/support/host_backend.h"

namespace longspan {
namespace {

class PagePoolTest : public ::testing::Test {
 protected:
  // 4 superblocks; 8 pages of 512 bytes or 5 of 768 in each.
  HostBackend backend_;
  Arena arena_ = *Arena::Create(backend_, 4 * 4096, 4096);
};

TEST_F(PagePoolTest, HandsOutDistinctPagesThatLieInTheArena) {
  PagePool pool(&arena_, 768);
  EXPECT_EQ(pool.available(), 20);
  std::set<int64_t> begins;
  for (int i = 0; i < 20; ++i) {
    const int64_t begin = pool.Take() * kPageUnitBytes;
    EXPECT_GE(begin, 0);
    EXPECT_LE(begin % 4096 + 768, 4096);
    EXPECT_EQ(begin % 4096 % 768, 0);
    begins.insert(begin);
  }
  EXPECT_EQ(begins.size(), 20u);
  EXPECT_EQ(pool.Take(), -1);
  EXPECT_EQ(pool.used(), 20);
  EXPECT_EQ(pool.available(), 0);
}

TEST_F(PagePoolTest, ReturnsAnEmptySuperblockToTheArena) {
  PagePool pool(&arena_, 512);
  std::vector<int32_t> pages;
  for (int i = 0; i < 9; ++i) pages.push_back(pool.Take());
  EXPECT_EQ(arena_.free(), 2);
  pool.Unref(pages[8]);
  EXPECT_EQ(arena_.free(), 3);
  for (int i = 0; i < 8; ++i) pool.Unref(pages[i]);
  EXPECT_EQ(arena_.free(), 4);
  EXPECT_EQ(pool.leased(), 0);
}

TEST_F(PagePoolTest, KeepsAPageUntilItsLastReferenceIsGone) {
  PagePool pool(&arena_, 512);
  const int32_t page = pool.Take();
  pool.Ref(page);
  EXPECT_EQ(pool.References(page), 2);
  pool.Unref(page);
  EXPECT_EQ(pool.used(), 1);
  pool.Unref(page);
  EXPECT_EQ(pool.used(), 0);
  EXPECT_EQ(pool.References(page), 0);
}

TEST_F(PagePoolTest, TwoPoolsShareOneArenaAsTheyNeedIt) {
  PagePool small(&arena_, 512), large(&arena_, 4096);
  for (int i = 0; i < 3; ++i) EXPECT_GE(large.Take(), 0);
  EXPECT_EQ(small.available(), 8);
  const int32_t page = small.Take();
  EXPECT_EQ(large.Take(), -1);
  small.Unref(page);
  EXPECT_GE(large.Take(), 0);
  EXPECT_EQ(small.Take(), -1);
}

TEST_F(PagePoolTest, EvacuatesTheEmptiestSuperblockWithItsReferences) {
  PagePool pool(&arena_, 512);
  std::vector<int32_t> pages;
  for (int i = 0; i < 24; ++i) pages.push_back(pool.Take());
  // Leave 6 + 5 + 2 pages; the last two have 1 and 3 references.
  for (int i : {0, 1, 8, 9, 10, 16, 17, 18, 19, 20, 21}) pool.Unref(pages[i]);
  pool.Ref(pages[23]);
  pool.Ref(pages[23]);
  const auto moves = pool.Evacuate();
  ASSERT_EQ(moves.size(), 2u);
  std::map<int32_t, int32_t> to(moves.begin(), moves.end());
  EXPECT_EQ(pool.References(to.at(pages[22])), 1);
  EXPECT_EQ(pool.References(to.at(pages[23])), 3);
  EXPECT_EQ(pool.References(pages[23]), 0);
  EXPECT_EQ(pool.used(), 13);
  EXPECT_EQ(pool.leased(), 2);
  EXPECT_EQ(arena_.free(), 2);
  EXPECT_TRUE(pool.CheckIntegrity().ok());
}

TEST_F(PagePoolTest, AgreesWithAPlainModelOverRandomCalls) {
  PagePool pool(&arena_, 768);
  std::map<int32_t, int> references;
  Random random(2);
  for (int i = 0; i < 20000; ++i) {
    const auto any = references.empty()
                         ? references.end()
                         : std::next(references.begin(), Pick(random, 0, references.size() - 1));
    switch (Pick(random, 0, 2)) {
      case 0: {
        const int32_t page = pool.Take();
        EXPECT_EQ(page < 0, references.size() == 20u);
        if (page >= 0) {
          EXPECT_TRUE(references.emplace(page, 1).second);
        }
        break;
      }
      case 1:
        if (any == references.end() || Pick(random, 0, 1)) break;
        pool.Ref(any->first);
        ++any->second;
        break;
      case 2:
        if (any == references.end()) break;
        pool.Unref(any->first);
        if (--any->second == 0) references.erase(any);
        break;
    }
    ASSERT_EQ(pool.used(), static_cast<int>(references.size()));
    for (const auto& [page, count] : references) ASSERT_EQ(pool.References(page), count);
    if (i % 100 == 0) {
      ASSERT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
      ASSERT_TRUE(arena_.CheckIntegrity().ok());
    }
  }
}

TEST_F(PagePoolTest, DiesWhenAPageIsFreedTwiceOrWasNeverThere) {
  PagePool pool(&arena_, 512);
  const int32_t kept = pool.Take(), freed = pool.Take();
  pool.Unref(freed);
  EXPECT_DEATH(pool.Unref(freed), "is free");
  EXPECT_DEATH(pool.Ref(kept + 1), "no page has id");
}

}  // namespace
}  // namespace longspan
