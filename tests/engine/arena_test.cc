#include "engine/arena.h"

#include <set>

#include "gtest/gtest.h"
#include "kernels/kv_view.h"
#include "tests/support/cache_case.h"
#include "tests/support/host_backend.h"

namespace longspan {
namespace {

TEST(Arena, SuperblockWastesAtMostOneSixtyFourthOnAnyPageSize) {
  Random random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::vector<int64_t> pages = {Pick(random, 1, 20000) * kPageUnitBytes,
                                        Pick(random, 0, 20000) * kPageUnitBytes};
    const int64_t superblock = Arena::SuperblockBytes(pages);
    EXPECT_GE(superblock, 2 << 20);
    EXPECT_EQ(superblock % kPageUnitBytes, 0);
    for (int64_t page : pages) {
      if (page > 0) {
        EXPECT_LE(superblock % page * 64, superblock) << page;
      }
    }
    // No more than what the waste rule can ask for.
    EXPECT_LE(superblock, std::max<int64_t>(2 << 20, 64 * std::max(pages[0], pages[1])) +
                              std::max(pages[0], pages[1]));
  }
}

TEST(Arena, LeasesEverySuperblockOnceAndThenNone) {
  HostBackend backend;
  Arena arena = *Arena::Create(backend, 10 * 4096 + 4095, 4096);
  EXPECT_EQ(arena.total(), 10);
  std::set<int> leased;
  for (int i = 0; i < 10; ++i) leased.insert(arena.Lease());
  EXPECT_EQ(leased.size(), 10u);
  EXPECT_EQ(*leased.begin(), 0);
  EXPECT_EQ(*leased.rbegin(), 9);
  EXPECT_EQ(arena.free(), 0);
  EXPECT_EQ(arena.Lease(), -1);
  arena.Return(7);
  EXPECT_EQ(arena.Lease(), 7);
  EXPECT_TRUE(arena.CheckIntegrity().ok());
}

TEST(Arena, SaysBothNumbersWhenItHoldsNoSuperblock) {
  HostBackend backend;
  const absl::Status status = Arena::Create(backend, 4095, 4096).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("4095"), std::string::npos);
  EXPECT_NE(status.message().find("4096"), std::string::npos);
}

TEST(Arena, RefusesMoreThanPageIdsCanCount) {
  HostBackend backend;
  const absl::Status status = Arena::Create(backend, int64_t{1} << 40, 2 << 20).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("1099511627776"), std::string::npos);
}

TEST(Arena, SaysHowMuchTheBackendCouldNotGive) {
  HostBackend backend;
  backend.refuse_above = 1 << 20;
  const absl::Status status = Arena::Create(backend, 4 << 20, 2 << 20).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("4194304"), std::string::npos);
}

TEST(ArenaDeathTest, DiesWhenASuperblockIsReturnedTwice) {
  HostBackend backend;
  Arena arena = *Arena::Create(backend, 8192, 4096);
  const int superblock = arena.Lease();
  arena.Return(superblock);
  EXPECT_DEATH(arena.Return(superblock), "not leased");
}

}  // namespace
}  // namespace longspan
