#include "server/flags.h"

#include <map>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace longspan {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Options {
  std::string host = "127.0.0.1";
  int threads = 0;
  int64_t bytes = 0;
  bool json = false;
  absl::Duration timeout = absl::Seconds(30);
  std::string level = "head";
  std::vector<std::string> alias;
  std::vector<int64_t> lengths = {1024};
  double temperature = 1;
};

// Parses `arguments` into `options`, with an environment.
absl::Status Read(Options& options, std::vector<std::string> arguments,
                  std::map<std::string, std::string> environment = {},
                  std::vector<std::string>* positional = nullptr) {
  Flags flags("serve", "[flags]", "Serves.");
  flags.String("host", &options.host, "HOST", "Where.");
  flags.Int("threads", &options.threads, "How many.", 0, 1024);
  flags.Bytes("cache-bytes", &options.bytes, "How much.");
  flags.Bool("json", &options.json, "As JSON.");
  flags.Duration("timeout", &options.timeout, "How long.");
  flags.Choice("level", &options.level, {"off", "layer", "head"}, "How deep.");
  flags.Strings("alias", &options.alias, "NAME", "More names.");
  flags.Ints("lengths", &options.lengths, "N,…", "Lengths.");
  flags.Double("temperature", &options.temperature, "Heat.");
  bool help = false;
  return flags.Read(
      arguments,
      [&](const char* name) {
        const auto found = environment.find(name);
        return found == environment.end() ? nullptr : found->second.c_str();
      },
      positional, &help);
}

TEST(Flags, TakesAValueAfterASpaceOrAnEqualsSign) {
  Options o;
  ASSERT_TRUE(Read(o, {"--host", "::1", "--threads=4"}).ok());
  EXPECT_EQ(o.host, "::1");
  EXPECT_EQ(o.threads, 4);
}

TEST(Flags, ReadsSuffixesAsPowersOf1024) {
  Options o;
  ASSERT_TRUE(Read(o, {"--cache-bytes", "1.5M", "--lengths", "1k,2K,300"}).ok());
  EXPECT_EQ(o.bytes, 1536 * 1024);
  EXPECT_THAT(o.lengths, ElementsAre(1024, 2048, 300));
  EXPECT_EQ(*ParseSize("2GiB"), int64_t{2} << 30);
  EXPECT_EQ(*ParseSize("3MB"), int64_t{3} << 20);
  EXPECT_EQ(FormatSize(8 << 20), "8M");
  EXPECT_EQ(FormatSize(1000), "1000");
}

TEST(Flags, RefusesNumbersThatAreNone) {
  for (const char* bad :
       {"", "k", "x", "1x", "1.3", "1e30", "nan", "0x10", "9999999999999G", "--1"}) {
    EXPECT_FALSE(ParseSize(bad).ok()) << bad;
  }
  for (const char* bad : {"", "s", "-1s", "-1", "nan", "inf", "3 parsecs"}) {
    EXPECT_FALSE(ParseDuration(bad).ok()) << bad;
  }
}

TEST(Flags, ReadsDurationsAndTakesABareNumberAsSeconds) {
  Options o;
  ASSERT_TRUE(Read(o, {"--timeout", "500ms"}).ok());
  EXPECT_EQ(o.timeout, absl::Milliseconds(500));
  ASSERT_TRUE(Read(o, {"--timeout", "2"}).ok());
  EXPECT_EQ(o.timeout, absl::Seconds(2));
}

TEST(Flags, SwitchesNeedNoValueAndCanBeNegated) {
  Options o;
  ASSERT_TRUE(Read(o, {"--json"}).ok());
  EXPECT_TRUE(o.json);
  ASSERT_TRUE(Read(o, {"--no-json"}).ok());
  EXPECT_FALSE(o.json);
  ASSERT_TRUE(Read(o, {"--json=true"}).ok());
  EXPECT_TRUE(o.json);
}

TEST(Flags, TakesTheEnvironmentUnlessTheCommandLineSaysOtherwise) {
  Options o;
  ASSERT_TRUE(
      Read(o, {"--threads", "8"}, {{"LONGSPAN_THREADS", "2"}, {"LONGSPAN_CACHE_BYTES", "1k"}})
          .ok());
  EXPECT_EQ(o.threads, 8);
  EXPECT_EQ(o.bytes, 1024);
}

TEST(Flags, AFlagWithAVariableOfItsOwnIgnoresTheOneOfItsName) {
  std::string model = "none";
  Flags flags("complete", "", "");
  flags.String("model", &model, "NAME", "which");
  flags.Variable("model", "LONGSPAN_CLIENT_MODEL");
  const std::map<std::string, std::string> environment = {{"LONGSPAN_MODEL", "/a/path"},
                                                          {"LONGSPAN_CLIENT_MODEL", "served"}};
  bool help = false;
  ASSERT_TRUE(flags
                  .Read(
                      {},
                      [&](const char* name) {
                        const auto it = environment.find(name);
                        return it == environment.end() ? nullptr : it->second.c_str();
                      },
                      nullptr, &help)
                  .ok());
  EXPECT_EQ(model, "served");
  EXPECT_THAT(flags.Help(), HasSubstr("LONGSPAN_CLIENT_MODEL"));
}

TEST(Flags, RepeatedFlagsAddUpAndReplaceTheEnvironments) {
  Options o;
  ASSERT_TRUE(Read(o, {"--alias", "a", "--alias", "b"}, {{"LONGSPAN_ALIAS", "env"}}).ok());
  EXPECT_THAT(o.alias, ElementsAre("a", "b"));
}

TEST(Flags, NamesTheNearestFlagForATypo) {
  Options o;
  const absl::Status status = Read(o, {"--thread", "4"});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("unknown flag --thread; did you mean --threads?"));
  EXPECT_THAT(std::string(Read(o, {"--zzzzzzzz"}).message()),
              ::testing::Not(HasSubstr("did you mean")));
}

TEST(Flags, SaysFlagValueAndLimitOfABadValue) {
  Options o;
  EXPECT_THAT(std::string(Read(o, {"--threads", "4096"}).message()),
              HasSubstr("--threads: 4096 is out of range; it must be between 0 and 1024"));
  EXPECT_THAT(std::string(Read(o, {"--level", "deep"}).message()),
              HasSubstr("--level: 'deep' is not one of off, layer, head"));
  EXPECT_THAT(std::string(Read(o, {}, {{"LONGSPAN_THREADS", "x"}}).message()),
              HasSubstr("environment variable LONGSPAN_THREADS"));
  EXPECT_THAT(std::string(Read(o, {"--threads"}).message()), HasSubstr("--threads needs a value"));
}

TEST(Flags, KeepsOtherArgumentsInOrder) {
  Options o;
  std::vector<std::string> rest;
  ASSERT_TRUE(Read(o, {"one", "--json", "-", "--", "--threads"}, {}, &rest).ok());
  EXPECT_THAT(rest, ElementsAre("one", "-", "--threads"));
  EXPECT_THAT(std::string(Read(o, {"one"}).message()), HasSubstr("unexpected argument 'one'"));
}

TEST(Flags, HelpShowsEachFlagWithItsDefault) {
  int running = 64;
  Flags flags("serve", "[flags]", "Serves a model.");
  flags.Section("Scheduling");
  flags.Int("max-running", &running, "Sequences with cache.");
  const std::string help = flags.Help();
  EXPECT_THAT(help, HasSubstr("usage: longspan serve [flags]"));
  EXPECT_THAT(help, HasSubstr("Scheduling:\n  --max-running N\n      Sequences with cache. [64]"));
}

}  // namespace
}  // namespace longspan
