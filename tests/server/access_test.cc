#include "server/access.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "engine/request.h"
#include "server/log.h"

namespace longspan {
namespace {

using ::testing::HasSubstr;

constexpr char kAlice[] = "alice-0123456789";
constexpr char kRoot[] = "root-00123456789";

class AccessTest : public ::testing::Test {
 protected:
  AccessTest() { SetLogLevel("error"); }
  ~AccessTest() override { std::remove(path_.c_str()); }

  void Write(const std::string& text) { std::ofstream(path_) << text; }
  void Open(const std::string& text) {
    Write(text);
    auto opened = Access::Open(path_, [this] { return now_; });
    ASSERT_TRUE(opened.ok()) << opened.status();
    access_ = *std::move(opened);
  }
  absl::StatusOr<Caller> Bearer(const std::string& secret, Role role = Role::kUser) {
    return access_->Authenticate(absl::StrCat("Bearer ", secret), role);
  }
  absl::StatusCode CodeOf(const std::string& authorization, Role role = Role::kUser) {
    return access_->Authenticate(authorization, role).status().code();
  }

  const std::string path_ = absl::StrCat(::testing::TempDir(), "/keys-", getpid());
  absl::Time now_ = absl::FromUnixSeconds(1'000'000);
  std::unique_ptr<Access> access_;
};

TEST_F(AccessTest, IsOpenToAllWithoutAFile) {
  access_ = *Access::Open("");
  EXPECT_TRUE(access_->Authenticate("", Role::kAdmin).ok());
  const Caller nobody = *access_->Authenticate("", Role::kUser);
  EXPECT_TRUE(nobody.MayAbort("anything"));
  EXPECT_TRUE(nobody.Begin("x", 1 << 30).ok());
}

TEST_F(AccessTest, SaysWhyAFileIsNoGood) {
  EXPECT_EQ(Access::Open("/no/such/file").status().code(), absl::StatusCode::kNotFound);
  Write("short\n");
  EXPECT_EQ(Access::Open(path_).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(AccessTest, KnowsKeysAndTheirRoles) {
  Open(absl::StrCat(kAlice, " name=alice\n", kRoot, " name=root admin\n"));
  EXPECT_EQ(Bearer(kAlice)->name(), "alice");
  EXPECT_EQ(access_->Authenticate(absl::StrCat("bearer ", kRoot), Role::kAdmin)->name(), "root");
  EXPECT_EQ(CodeOf(""), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(CodeOf("Bearer "), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(CodeOf("Bearer"), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(CodeOf(kAlice), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(CodeOf(absl::StrCat("Basic ", kAlice)), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(CodeOf(absl::StrCat("Bearer ", kAlice, " ")), absl::StatusCode::kUnauthenticated);
  const absl::Status denied = Bearer(kAlice, Role::kAdmin).status();
  EXPECT_EQ(denied.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(denied.message()), HasSubstr("alice"));
}

TEST_F(AccessTest, ReadsAChangedFileAgain) {
  Open(absl::StrCat(kAlice, "\n"));
  Write(absl::StrCat(kAlice, " admin\n", kRoot, "\n"));
  EXPECT_FALSE(Bearer(kRoot).ok());  // looks once a second
  now_ += absl::Seconds(1);
  EXPECT_TRUE(Bearer(kRoot).ok());
  EXPECT_TRUE(Bearer(kAlice, Role::kAdmin).ok());
  Write(absl::StrCat(kRoot, "\n"));
  now_ += absl::Seconds(1);
  EXPECT_FALSE(Bearer(kAlice).ok());
}

TEST_F(AccessTest, KeepsTheLastGoodKeysWhenTheFileBreaksOrGoes) {
  Open(absl::StrCat(kAlice, "\n"));
  Write("oops\n");
  now_ += absl::Seconds(1);
  EXPECT_TRUE(Bearer(kAlice).ok());
  std::remove(path_.c_str());
  now_ += absl::Seconds(1);
  EXPECT_TRUE(Bearer(kAlice).ok());
  Write(absl::StrCat(kRoot, "\n"));
  now_ += absl::Seconds(1);
  EXPECT_FALSE(Bearer(kAlice).ok());
  EXPECT_TRUE(Bearer(kRoot).ok());
}

TEST_F(AccessTest, BoundsAKeysRequestsAtOnce) {
  Open(absl::StrCat(kAlice, " name=alice max-requests=2\n"));
  const Caller alice = *Bearer(kAlice);
  auto first = alice.Begin("a", 1), second = alice.Begin("b", 1);
  ASSERT_TRUE(first.ok() && second.ok());
  const absl::Status third = alice.Begin("c", 1).status();
  EXPECT_EQ(third.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(third.message(), "key 'alice' has 2 requests in flight, the limit is 2");
  EXPECT_EQ(third.GetPayload(kErrorReason), "KEY_LIMIT");
  *first = Lease();
  EXPECT_TRUE(alice.Begin("c", 1).ok());
}

// A minute's tokens at once, then as many as the minute brings: 600 a minute are 10 a second.
TEST_F(AccessTest, BoundsAKeysTokensPerMinute) {
  Open(absl::StrCat(kAlice, " name=alice tokens-per-minute=600\n"));
  const Caller alice = *Bearer(kAlice);
  {
    const auto lease = alice.Begin("a", 500);
    ASSERT_TRUE(lease.ok());
    lease->Charge(149);  // 49 more than there were
  }
  const absl::Status refused = alice.Begin("b", 1).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.message(),
            "key 'alice' has used its 600 tokens a minute; the next request is taken in 5s");
  now_ += absl::Milliseconds(4899);
  EXPECT_FALSE(alice.Begin("b", 1).ok());
  now_ += absl::Milliseconds(101);
  EXPECT_TRUE(alice.Begin("b", 1).ok());
  now_ += absl::Hours(1);  // fills to a minute's worth, not more
  EXPECT_TRUE(alice.Begin("c", 600).ok());
  EXPECT_FALSE(alice.Begin("d", 1).ok());
}

TEST_F(AccessTest, KeepsWhatAKeyHasUsedWhenItsLimitsChange) {
  Open(absl::StrCat(kAlice, " tokens-per-minute=600\n"));
  ASSERT_TRUE(Bearer(kAlice)->Begin("a", 900).ok());
  Write(absl::StrCat(kAlice, " tokens-per-minute=6000\n"));
  now_ += absl::Seconds(1);
  EXPECT_FALSE(Bearer(kAlice)->Begin("b", 1).ok());  // 290 are still owed
  now_ += absl::Seconds(3);
  EXPECT_TRUE(Bearer(kAlice)->Begin("b", 1).ok());
}

TEST_F(AccessTest, LetsAKeyAbortItsOwnRequestsOnly) {
  Open(absl::StrCat(kAlice, "\n", kRoot, " admin\nbob-01234567890123\n"));
  const Caller alice = *Bearer(kAlice), bob = *Bearer("bob-01234567890123");
  const auto lease = alice.Begin("mine", 1);
  EXPECT_TRUE(alice.MayAbort("mine"));
  EXPECT_FALSE(bob.MayAbort("mine"));
  EXPECT_TRUE(Bearer(kRoot)->MayAbort("mine"));
  EXPECT_TRUE(alice.MaySee(*Bearer(kAlice)));
  EXPECT_FALSE(bob.MaySee(alice));
  EXPECT_TRUE(Bearer(kRoot)->MaySee(alice));
}

}  // namespace
}  // namespace longspan
