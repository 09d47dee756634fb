#pragma once
// Where tests find the project's own files.
#include <string>

namespace longspan::testing {

std::string SourcePath(const std::string& relative);  // below the source tree
std::string TempDir();                                // fresh, removed at exit

}  // namespace longspan::testing
