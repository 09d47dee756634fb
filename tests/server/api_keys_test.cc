#include "server/api_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

using ::testing::HasSubstr;

constexpr char kSecret[] = "0123456789abcdef";
constexpr char kOther[] = "fedcba9876543210";

void ExpectRefused(const std::string& text, const std::string& why) {
  const auto keys = ParseApiKeys(text, "keys.txt");
  ASSERT_FALSE(keys.ok()) << text;
  EXPECT_EQ(keys.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(keys.status().message()), HasSubstr(why));
  EXPECT_EQ(keys.status().message().find(kSecret), std::string::npos) << "tells the secret";
}

TEST(ApiKeys, AreOneALineWithTheirLimits) {
  const auto keys = ParseApiKeys(
      absl::StrCat("# who may call\n\n", kSecret,
                   "\tname=alice max-requests=2  tokens-per-minute=600 # by hand\r\n  ", kOther,
                   " admin"),
      "keys.txt");
  ASSERT_TRUE(keys.ok()) << keys.status();
  ASSERT_EQ(keys->size(), 2u);
  EXPECT_EQ((*keys)[0].secret, kSecret);
  EXPECT_EQ((*keys)[0].name, "alice");
  EXPECT_EQ((*keys)[0].max_requests, 2);
  EXPECT_EQ((*keys)[0].tokens_per_minute, 600);
  EXPECT_FALSE((*keys)[0].admin);
  EXPECT_EQ((*keys)[1].name, "key-4");
  EXPECT_TRUE((*keys)[1].admin);
}

TEST(ApiKeys, AreRefusedByLineWithoutTellingTheSecret) {
  ExpectRefused("", "keys.txt: has no key");
  ExpectRefused("# only a comment\n", "keys.txt: has no key");
  ExpectRefused("\nshort", "keys.txt:2: the key has 5 characters, must have from 16 to 512");
  ExpectRefused(std::string(513, 'a'), "the key has 513 characters");
  ExpectRefused("0123456789abcde\x80", "not printable ASCII");
  ExpectRefused(absl::StrCat(kSecret, " max-requests=0"), "max-requests is '0', must be");
  ExpectRefused(absl::StrCat(kSecret, " tokens-per-minute=-1"), "tokens-per-minute is '-1'");
  ExpectRefused(absl::StrCat(kSecret, " tokens-per-minute=9999999999999999999"), "must be a whole");
  ExpectRefused(absl::StrCat(kOther, " ", kSecret), "one word is none of them");
  ExpectRefused(absl::StrCat(kSecret, " name="), "one word is none of them");
  ExpectRefused(absl::StrCat(kSecret, "\n", kSecret), "keys.txt:2: the key is on an earlier line");
  ExpectRefused(absl::StrCat(kSecret, " name=a\n", kOther, " name=a"), "the name 'a' is on");
}

TEST(SameSecret, IsTrueOfEqualTextsOnly) {
  EXPECT_TRUE(SameSecret(kSecret, kSecret));
  EXPECT_FALSE(SameSecret(kSecret, kOther));
  EXPECT_FALSE(SameSecret(kSecret, ""));
  EXPECT_FALSE(SameSecret(kSecret, "0123456789abcde"));
  EXPECT_FALSE(SameSecret(kSecret, absl::StrCat(kSecret, kSecret)));  // which repeats it
}

}  // namespace
}  // namespace longspan
