#include "server/bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/config.h"

namespace longspan {
namespace {

using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::FieldsAre;
using ::testing::HasSubstr;

TEST(BenchItems, AreLengthsWithOrWithoutACount) {
  const auto items = ParseBenchItems("128,2k,32x2k,1x1");
  ASSERT_TRUE(items.ok()) << items.status();
  EXPECT_THAT(*items, ElementsAre(FieldsAre(0, 128), FieldsAre(0, 2048), FieldsAre(32, 2048),
                                  FieldsAre(1, 1)));
}

TEST(BenchItems, NameThePartThatIsNone) {
  for (const char* bad : {"", "0", "-1", "16777217", "x", "x2", "2x", "0x2", "4097x2", "2x2x2",
                          "2y", "1.5", "99999999999999999999"}) {
    const auto items = ParseBenchItems(std::string("7,") + bad);
    EXPECT_EQ(items.status().code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(items.status().message()), HasSubstr(std::string("'") + bad + "'"));
  }
}

TEST(Shape, IsAShippedNameOrAPath) {
  const auto shipped = ShapePath("gemma3-4b");
  ASSERT_TRUE(shipped.ok()) << shipped.status();
  EXPECT_THAT(*shipped, EndsWith("shapes/gemma3-4b.json"));
  EXPECT_EQ(*ShapePath("some/config.json"), "some/config.json");
  EXPECT_EQ(*ShapePath("config.json"), "config.json");
  EXPECT_EQ(*ShapePath("/"), "//config.json");  // a folder's
  const auto unknown = ShapePath("gemma9");
  EXPECT_EQ(unknown.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(unknown.status().message()), HasSubstr("gemma3-4b"));
}

}  // namespace
}  // namespace longspan
