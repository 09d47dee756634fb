#pragma once
// Where tests find the project's own files.
#include <string>

namespace longspan::testing {

// Below the source tree; $LONGSPAN_SOURCE_DIR says where it has moved to since the build.
std::string SourcePath(const std::string& relative);
std::string TempDir();  // fresh, removed at exit

}  // namespace longspan::testing
