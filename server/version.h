#pragma once
// Which program this is; the values come from CMake (version.cc.in).

namespace longspan {

extern const char kVersion[];    // "0.1.0"
extern const char kGitCommit[];  // short hash, or "unknown" outside a checkout

}  // namespace longspan
