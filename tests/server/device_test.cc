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

TEST(KvDtype, IsATypeThatTheDeviceComputesOn) {
  const auto Is = [](const char* name, const char* device, DType type) {
    const auto found = KvDtypeOf(name, device);
    return found.ok() && *found == type;
  };
  for (const char* device : {"cpu", "cuda:1"}) {
    EXPECT_TRUE(Is("bf16", device, DType::kBF16));
    EXPECT_TRUE(Is("f32", device, DType::kF32));
  }
  EXPECT_TRUE(Is("q8_0", "cpu", DType::kQ8_0));
}

TEST(KvDtype, RefusesWithFlagAndDevice) {
  const absl::Status there = KvDtypeOf("q8_0", "cuda:1").status();
  EXPECT_EQ(there.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(there.message()), HasSubstr("--kv-dtype q8_0"));
  EXPECT_THAT(std::string(there.message()), HasSubstr("cuda:1"));
  const absl::Status unknown = KvDtypeOf("q4_0", "cpu").status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("--kv-dtype is 'q4_0'"));
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("bf16, f32, q8_0"));
}

}  // namespace
}  // namespace longspan
