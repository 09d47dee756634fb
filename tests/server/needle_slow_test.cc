// The default model finds needles where its card says that it does, with the heads that it names;
// and the command line does all of it against a live server process.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/support/paths.h"

namespace longspan {
namespace {

const std::string kBinary = LONGSPAN_BINARY_DIR "/longspan";

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// The number that follows `before` in `text`; 0 if there is none.
int NumberAfter(const std::string& text, const std::string& before) {
  const size_t at = text.find(before);
  return at == std::string::npos ? 0 : std::atoi(text.c_str() + at + before.size());
}

class LiveServer : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = testing::TempDir();
    const std::string log = folder_ + "/log";
    server_ = fork();
    if (server_ == 0) {
      if (std::freopen(log.c_str(), "w", stderr) == nullptr) _exit(1);
      execl(kBinary.c_str(), "longspan", "serve", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
            static_cast<char*>(nullptr));
      _exit(127);
    }
    for (int i = 0; i < 600 && port_ == 0; ++i) {
      absl::SleepFor(absl::Milliseconds(50));
      port_ = NumberAfter(ReadFile(log), " ready grpc=127.0.0.1:");
    }
  }
  // Here and not above: a failure in SetUpTestSuite would leave its tests skipped, which ctest lets
  // pass.
  void SetUp() override { ASSERT_NE(port_, 0) << ReadFile(folder_ + "/log"); }
  static void TearDownTestSuite() {
    kill(server_, SIGTERM);
    int status = 0;
    waitpid(server_, &status, 0);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }

  struct Result {
    int exit = -1;
    std::string out, err;
  };
  static std::string CommandLine(const std::string& arguments) {
    return absl::StrCat("LONGSPAN_SERVER=127.0.0.1:", port_, " exec ", kBinary, " ", arguments,
                        " >", folder_, "/out 2>", folder_, "/err </dev/null");
  }
  static Result Run(const std::string& arguments) {
    const int status = std::system(CommandLine(arguments).c_str());
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, ReadFile(folder_ + "/out"),
            ReadFile(folder_ + "/err")};
  }

  static pid_t server_;
  static int port_;
  static std::string folder_;
};
pid_t LiveServer::server_ = 0;
int LiveServer::port_ = 0;
std::string LiveServer::folder_;

// The model's card, by an independent implementation: 1.0 at 4K and 8K; layer 5 heads 0, 2, 3, 5,
// 1, 4.
TEST_F(LiveServer, FindsNeedlesFrom1KTo8KWithTheHeadsOfOneFullLayer) {
  const Result result = Run("needle --lengths 1k,2k,4k,8k --depths 5 --seed 11 --no-save --json");
  ASSERT_EQ(result.exit, 0) << result.err;
  const auto summary = nlohmann::json::parse(result.out, nullptr, false);
  ASSERT_TRUE(summary.is_object()) << result.out;
  EXPECT_GE(summary["mean_score"].get<double>(), 0.95);
  std::set<int> heads;
  for (const auto& head : summary["retrieval_heads"]) {
    EXPECT_EQ(head["layer"], 5);
    EXPECT_EQ(head["kind"], "full");
    heads.insert(head["head"].get<int>());
  }
  for (const int head : {0, 1, 2, 3, 5}) EXPECT_TRUE(heads.contains(head)) << head;
  // The same heads stand out by what they copied, which needs no knowledge of the needles.
  std::istringstream lines(Run("spans --show copy --heads 4").out);
  std::set<int> copying;
  for (std::string line; std::getline(lines, line);) {
    int layer = 0, head = 0;
    if (std::sscanf(line.c_str(), "%d full %d", &layer, &head) != 2) continue;
    EXPECT_EQ(layer, 5) << line;
    copying.insert(head);
  }
  EXPECT_EQ(copying.size(), 4u);
  for (const int head : copying) EXPECT_TRUE(heads.contains(head)) << head;
}

TEST_F(LiveServer, AnInterruptedRunIsResumedWhereItStopped) {
  const std::string run = folder_ + "/run";
  const std::string command =
      "needle --lengths 512,1k --depths 3 --trials 10 --concurrency 2 --jsonl --out " + run;
  const pid_t client = fork();
  if (client == 0) {
    execl("/bin/sh", "sh", "-c", CommandLine(command).c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  for (int i = 0; i < 400 && ReadFile(run + "/results.jsonl").empty(); ++i) {
    absl::SleepFor(absl::Milliseconds(50));
  }
  kill(client, SIGINT);
  int status = 0;
  waitpid(client, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 130);
  const std::string before = ReadFile(run + "/results.jsonl");
  const auto done = std::count(before.begin(), before.end(), '\n');
  ASSERT_GT(done, 0);
  ASSERT_LT(done, 60);

  const Result second = Run(command);
  EXPECT_EQ(second.exit, 0) << second.err;
  EXPECT_EQ(std::count(second.out.begin(), second.out.end(), '\n'), 60 - done);
  const std::string after = ReadFile(run + "/results.jsonl");
  EXPECT_EQ(std::count(after.begin(), after.end(), '\n'), 60);
  EXPECT_TRUE(std::filesystem::exists(run + "/heatmap.svg"));
  EXPECT_TRUE(std::filesystem::exists(run + "/report.html"));
  EXPECT_EQ(Run("needle --lengths 512 --depths 3 --out " + run).exit, 2);  // another grid
}

TEST_F(LiveServer, ExitStatusTellsWhatHappened) {
  EXPECT_EQ(Run("needle --lengths 300 --depths 1 --no-save").exit, 0);
  EXPECT_EQ(Run("needle --lengths 300 --depths 1 --no-save --min-score 1.1").exit, 3);
  EXPECT_EQ(Run("needle --lengths 99k --no-save").exit, 1);
  EXPECT_EQ(Run("needle --lenghts 1k").exit, 2);
  EXPECT_EQ(Run("needle --depths 1,x").exit, 2);
  EXPECT_EQ(Run("health").exit, 0);
  EXPECT_EQ(Run("health --server 127.0.0.1:1 --timeout 1s").exit, 1);
}

TEST_F(LiveServer, DataGoesToStdoutAndTheRestToStderr) {
  Result result = Run("complete --prompt 'Once upon a time' --max-tokens 8 --temperature 0 --json");
  ASSERT_EQ(result.exit, 0) << result.err;
  EXPECT_TRUE(nlohmann::json::accept(result.out)) << result.out;
  result = Run("complete --prompt 'Once upon a time' --max-tokens 4 --n 2 --jsonl");
  ASSERT_EQ(result.exit, 0) << result.err;
  std::istringstream events(result.out);
  int read = 0;
  for (std::string line; std::getline(events, line); ++read) {
    EXPECT_TRUE(nlohmann::json::accept(line)) << line;
  }
  EXPECT_GE(read, 3);  // each choice's end and the usage at least
  EXPECT_EQ(Run("complete --prompt 'Once' --model nobody").out, "");
  result = Run("spans --json");
  ASSERT_EQ(result.exit, 0) << result.err;
  EXPECT_TRUE(nlohmann::json::accept(result.out));
  result = Run("needle --lengths 300 --depths 2 --no-save --jsonl");
  std::istringstream lines(result.out);
  int cells = 0;
  for (std::string line; std::getline(lines, line); ++cells) {
    EXPECT_TRUE(nlohmann::json::accept(line)) << line;
  }
  EXPECT_EQ(cells, 2);
  EXPECT_EQ(result.out.find('\033'), std::string::npos);
  EXPECT_NE(Run("needle --lengths 300 --depths 2 --no-save --color always").out.find("\033[48;2;"),
            std::string::npos);
  // One token a line, its piece in quotes; the pieces put together are the text behind its
  // beginning.
  std::istringstream tokens(Run("tokenize hello").out);
  std::string pieces;
  for (std::string line; std::getline(tokens, line);) {
    const size_t open = line.find('"'), close = line.rfind('"');
    ASSERT_NE(open, close) << line;
    pieces += line.substr(open + 1, close - open - 1);
  }
  EXPECT_EQ(pieces, "<|doc|>hello");
}

TEST_F(LiveServer, EveryCommandTeachesWithHelp) {
  for (const char* command : {"complete", "chat", "tokenize", "describe", "models", "health",
                              "needle", "spans", "drain", "bench", "serve"}) {
    const Result result = Run(absl::StrCat(command, " --help"));
    EXPECT_EQ(result.exit, 0) << command;
    EXPECT_NE(result.out.find("usage"), std::string::npos) << command << result.out;
  }
}

}  // namespace
}  // namespace longspan
