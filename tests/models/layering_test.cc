// The picture in README.md, held against every #include in the tree.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>
#include <vector>

#include "tests/support/paths.h"

namespace longspan {
namespace {

namespace fs = std::filesystem;

// What a folder's files may include with quotes: itself and what stands to its right.
const std::map<std::string, std::set<std::string>> kArrows = {
    {"server", {"server", "proto", "engine", "models", "kernels"}},
    {"engine", {"engine", "models", "kernels"}},
    {"models", {"models", "kernels"}},
    {"kernels", {"kernels"}},
};

struct Include {
  std::string file, path;
  bool quoted;
};

std::vector<Include> IncludesOf(const std::string& folder) {
  static const std::regex kInclude(R"(^\s*#\s*include\s*([<"])([^>"]+)[>"])");
  std::vector<Include> includes;
  for (const auto& entry : fs::recursive_directory_iterator(testing::SourcePath(folder))) {
    const std::string extension = entry.path().extension();
    if (!std::set<std::string>{".h", ".cc", ".inl", ".cu", ".cuh", ".in"}.contains(extension))
      continue;
    std::ifstream in(entry.path());
    const std::string file = fs::relative(entry.path(), testing::SourcePath("")).string();
    std::smatch match;
    for (std::string line; std::getline(in, line);) {
      if (std::regex_search(line, match, kInclude)) {
        includes.push_back({file, match[2], match[1] == "\""});
      }
    }
  }
  return includes;
}

std::string TargetOf(const std::string& path) {
  if (path.starts_with("longspan/v1/") || path.starts_with("google/rpc/")) return "proto";
  const std::string top = path.substr(0, path.find('/'));
  return kArrows.contains(top) ? top : "";
}

TEST(Layering, IncludesFollowTheArrows) {
  for (const auto& [folder, allowed] : kArrows) {
    const auto includes = IncludesOf(folder);
    EXPECT_GT(includes.size(), 20u) << folder;  // the scan saw the tree
    for (const Include& include : includes) {
      const std::string target = TargetOf(include.path);
      if (target.empty()) continue;
      EXPECT_TRUE(allowed.contains(target)) << include.file << " includes " << include.path;
    }
  }
}

TEST(Layering, LibrariesEndWhereTheyBelong) {
  const struct {
    const char* prefix;
    std::set<std::string> folders;
  } homes[] = {
      {"google/protobuf/", {"server"}},
      {"grpc", {"server"}},
      {"prometheus/", {"server"}},
      {"civetweb", {"server"}},
      {"nlohmann/", {"models", "server"}},
      {"sentencepiece", {"models"}},
      {"absl/", {"models", "engine", "server"}},
      {"cuda", {"kernels"}},
  };
  for (const auto& [folder, unused] : kArrows) {
    for (const Include& include : IncludesOf(folder)) {
      for (const auto& home : homes) {
        if (include.quoted && TargetOf(include.path) == folder) continue;
        if (!include.path.starts_with(home.prefix)) continue;
        EXPECT_TRUE(home.folders.contains(folder)) << include.file << " includes " << include.path;
      }
    }
  }
}

// nvcc compiles these: std and one another only.
TEST(Layering, WhatNvccCompilesKnowsOnlyItsOwnKind) {
  const std::set<std::string> shared = {"kernels/dtype.h",       "kernels/view.h",
                                        "kernels/draw.h",        "kernels/kv_view.h",
                                        "kernels/span_record.h", "kernels/ops.h"};
  for (const Include& include : IncludesOf("kernels")) {
    if (!shared.contains(include.file) || !include.quoted) continue;
    EXPECT_TRUE(shared.contains(include.path)) << include.file << " includes " << include.path;
  }
}

TEST(Layering, OneFileKnowsSentencepiece) {
  std::set<std::string> files;
  for (const Include& include : IncludesOf("models")) {
    if (include.path.starts_with("sentencepiece")) files.insert(include.file);
  }
  EXPECT_EQ(files.size(), 1u);
}

}  // namespace
}  // namespace longspan
