#include "server/device.h"

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/support/simds.h"

namespace longspan {
namespace {

using ::testing::HasSubstr;

TEST(Device, IsACpuWithTheInstructionsThatAreNamed) {
  for (const char* simd : testing::RunnableSimds()) {
    const auto device = OpenDevice({.threads = 1, .simd = simd});
    ASSERT_TRUE(device.ok()) << device.status();
    EXPECT_EQ((*device)->name(), absl::StrCat("cpu (", simd, ", 1 thread)"));
  }
  const auto best = OpenDevice({.threads = 1});
  ASSERT_TRUE(best.ok()) << best.status();
  EXPECT_THAT((*best)->name(), HasSubstr(SimdName(BestSimd())));
}

TEST(Device, RefusesInstructionsThatAreNotThere) {
  const absl::Status unknown = OpenDevice({.simd = "mmx"}).status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("mmx"));
  for (const Simd simd : kSimds) {
    if (MachineRuns(simd)) continue;
    EXPECT_TRUE(absl::IsUnavailable(OpenDevice({.simd = SimdName(simd)}).status()));
  }
}

}  // namespace
}  // namespace longspan
