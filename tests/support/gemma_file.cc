#include "tests/support/gemma_file.h"

#include <cstdlib>
#include <filesystem>

#include "kernels/check.h"
#include "tests/support/paths.h"

namespace longspan::testing {

std::string GemmaFile() {
  if (const char* path = std::getenv("LONGSPAN_GEMMA_GGUF")) return path;
  const std::string path = SourcePath("models/downloads/gemma-3-270m.gguf");
  if (!std::filesystem::exists(path)) {
    const std::string get = SourcePath("models/get") + " gemma-3-270m >&2";
    CHECK_EQ(std::system(get.c_str()), 0) << get;
  }
  return path;
}

}  // namespace longspan::testing
