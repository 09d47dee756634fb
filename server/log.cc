#include "server/log.h"

#include <unistd.h>

#include <atomic>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace longspan {
namespace {

constexpr absl::string_view kNames[] = {"debug", "info", "warning", "error"};
constexpr absl::string_view kShown[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
std::atomic<LogLevel> lowest{LogLevel::kInfo};
std::atomic<LogFormat> chosen{LogFormat::kText};

bool IsPlain(absl::string_view value) {
  for (unsigned char c : value) {
    if (c <= ' ' || c == '"' || c == '=' || c == '\\' || c == 0x7f) return false;
  }
  return !value.empty();
}

// Bytes that are not UTF-8 become U+FFFD.
std::string Quoted(absl::string_view text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string TextLine(const std::string& time, LogLevel level, absl::string_view event,
                     LogFields fields) {
  std::string line = absl::StrCat(time, " ", kShown[static_cast<int>(level)], " ", event);
  for (const auto& [key, value] : fields) {
    absl::StrAppend(&line, " ", key, "=");
    if (IsPlain(value.text)) {
      absl::StrAppend(&line, value.text);
    } else {
      absl::StrAppend(&line, "\"", absl::Utf8SafeCEscape(value.text), "\"");
    }
  }
  return line;
}

std::string JsonLine(const std::string& time, LogLevel level, absl::string_view event,
                     LogFields fields) {
  std::string line = absl::StrCat("{\"time\":\"", time, "\",\"level\":\"",
                                  kNames[static_cast<int>(level)], "\",\"event\":", Quoted(event));
  for (const auto& [key, value] : fields) {
    absl::StrAppend(&line, ",", Quoted(key), ":", value.number ? value.text : Quoted(value.text));
  }
  return line + "}";
}

}  // namespace

LogValue LogValue::Seconds(double value) {
  LogValue seconds(absl::StrFormat("%.6f", value));
  seconds.number = true;
  return seconds;
}

bool SetLogLevel(absl::string_view level) {
  for (int i = 0; i < 4; ++i) {
    if (level != kNames[i]) continue;
    lowest = static_cast<LogLevel>(i);
    return true;
  }
  return false;
}

bool SetLogFormat(absl::string_view format) {
  if (format != "text" && format != "json") return false;
  chosen = format == "json" ? LogFormat::kJson : LogFormat::kText;
  return true;
}

std::string LogLine(LogFormat format, LogLevel level, absl::string_view event, LogFields fields) {
  const std::string time =
      absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  const auto make = format == LogFormat::kJson ? JsonLine : TextLine;
  return make(time, level, event, fields) + "\n";
}

void Log(LogLevel level, absl::string_view event, LogFields fields) {
  if (level < lowest.load(std::memory_order_relaxed)) return;
  const std::string line = LogLine(chosen.load(std::memory_order_relaxed), level, event, fields);
  // One write, so that lines of several threads do not mix; nothing can be done if stderr is
  // closed.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace longspan
