#include "tests/support/paths.h"

#include <cstdlib>
#include <filesystem>
#include <vector>

#include "kernels/check.h"

namespace longspan::testing {
namespace {

struct Directories {
  std::vector<std::string> paths;
  ~Directories() {
    std::error_code ignored;
    for (const auto& path : paths) std::filesystem::remove_all(path, ignored);
  }
};

}  // namespace

std::string SourcePath(const std::string& relative) {
  const char* moved = std::getenv("LONGSPAN_SOURCE_DIR");
  return std::string(moved != nullptr ? moved : LONGSPAN_SOURCE_DIR) + "/" + relative;
}

std::string TempDir() {
  static Directories directories;
  std::string path = (std::filesystem::temp_directory_path() / "longspan-XXXXXX").string();
  CHECK(mkdtemp(path.data()) != nullptr) << path;
  directories.paths.push_back(path);
  return path;
}

}  // namespace longspan::testing
