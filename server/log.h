#pragma once
// Log lines on stderr: time, level, what happened, then key=value pairs. Safe from any thread.
#include <initializer_list>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"

namespace longspan {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// Lines below `level` are dropped. "debug", "info", "warning" or "error"; false for anything else.
bool SetLogLevel(absl::string_view level);

// 2026-11-24T01:02:03.004Z INFO ready model=longspan-18m grpc=127.0.0.1:50051
// Values with spaces, quotes or control characters are quoted and escaped. Never pass prompts or
// answers.
void Log(LogLevel level, absl::string_view event,
         std::initializer_list<std::pair<absl::string_view, std::string>> fields = {});
std::string LogLine(LogLevel level, absl::string_view event,
                    std::initializer_list<std::pair<absl::string_view, std::string>> fields);

}  // namespace longspan
