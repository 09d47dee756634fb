#pragma once
// Log lines on stderr: time, level, what happened, then named values; as text or as one JSON object
// a line. Safe from any thread.
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace longspan {

enum class LogLevel { kDebug, kInfo, kWarning, kError };
enum class LogFormat { kText, kJson };

// A text, or a number, which JSON shows without quotes.
struct LogValue {
  LogValue(std::string text) : text(std::move(text)), number(false) {}
  LogValue(absl::string_view text) : LogValue(std::string(text)) {}
  LogValue(const char* text) : LogValue(std::string(text)) {}
  template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
  LogValue(T value) : text(absl::StrCat(value)), number(true) {}
  static LogValue Seconds(double value);  // to the microsecond

  std::string text;
  bool number;
};
using LogFields = std::initializer_list<std::pair<absl::string_view, LogValue>>;

// Lines below `level` are dropped. "debug", "info", "warning" or "error"; false for anything else.
bool SetLogLevel(absl::string_view level);
// "text" or "json"; false for anything else.
bool SetLogFormat(absl::string_view format);

// 2026-11-24T01:02:03.004Z INFO ready model=longspan-18m grpc=127.0.0.1:50051
// {"time":"2026-11-24T01:02:03.004Z","level":"info","event":"ready","model":"longspan-18m",...}
// Values with spaces, quotes or control characters are quoted and escaped. Never pass prompts or
// answers, but where an operator asks for them.
void Log(LogLevel level, absl::string_view event, LogFields fields = {});
std::string LogLine(LogFormat format, LogLevel level, absl::string_view event, LogFields fields);

}  // namespace longspan
