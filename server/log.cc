#include "server/log.h"

#include <unistd.h>

#include <atomic>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace longspan {
namespace {

constexpr absl::string_view kNames[] = {"debug", "info", "warning", "error"};
constexpr absl::string_view kShown[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
std::atomic<LogLevel> lowest{LogLevel::kInfo};

bool IsPlain(absl::string_view value) {
  for (unsigned char c : value) {
    if (c <= ' ' || c == '"' || c == '=' || c == '\\' || c == 0x7f) return false;
  }
  return !value.empty();
}

}  // namespace

bool SetLogLevel(absl::string_view level) {
  for (int i = 0; i < 4; ++i) {
    if (level != kNames[i]) continue;
    lowest = static_cast<LogLevel>(i);
    return true;
  }
  return false;
}

std::string LogLine(LogLevel level, absl::string_view event,
                    std::initializer_list<std::pair<absl::string_view, std::string>> fields) {
  std::string line =
      absl::StrCat(absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone()), " ",
                   kShown[static_cast<int>(level)], " ", event);
  for (const auto& [key, value] : fields) {
    absl::StrAppend(&line, " ", key, "=");
    if (IsPlain(value)) {
      absl::StrAppend(&line, value);
    } else {
      absl::StrAppend(&line, "\"", absl::Utf8SafeCEscape(value), "\"");
    }
  }
  line += '\n';
  return line;
}

void Log(LogLevel level, absl::string_view event,
         std::initializer_list<std::pair<absl::string_view, std::string>> fields) {
  if (level < lowest.load(std::memory_order_relaxed)) return;
  const std::string line = LogLine(level, event, fields);
  // One write, so that lines of several threads do not mix; nothing can be done if stderr is
  // closed.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

}  // namespace longspan
