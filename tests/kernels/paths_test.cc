#include <gtest/gtest.h>

#include "tests/support/paths.h"

TEST(Paths, TempDirsDiffer) {
  EXPECT_NE(longspan::testing::TempDir(), longspan::testing::TempDir());
}
