#include "engine/decode_buckets.h"

#include <gtest/gtest.h>

#include <vector>

namespace longspan {
namespace {

TEST(DecodeBuckets, EveryNumberFitsTheLeastThatHoldsIt) {
  for (int most : {1, 7, 16, 17, 64, 100, 1000, 4096}) {
    const std::vector<int> buckets = DecodeBuckets(most);
    size_t next = 0;
    for (int n = 1; n <= most; ++n) {
      while (buckets[next] < n) ++next;
      EXPECT_EQ(DecodeBucket(n, most), buckets[next]) << n << " of " << most;
    }
    EXPECT_EQ(buckets.back(), most);
  }
}

TEST(DecodeBuckets, AreFewAndNotFarFromWhatTheyHold) {
  EXPECT_EQ(DecodeBuckets(64), (std::vector<int>{1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11,
                                                 12, 13, 14, 15, 16, 24, 32, 40, 48, 56, 64}));
  EXPECT_EQ(DecodeBuckets(4096).size(), 16 + 6 + 6 + 30u);
  for (int n = 1; n <= 4096; ++n) EXPECT_LE(DecodeBucket(n, 4096), n + n / 2) << n;
}

}  // namespace
}  // namespace longspan
