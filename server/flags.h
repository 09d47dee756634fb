#pragma once
// Command-line flags of one command: `--name value`, `--name=value`, `--switch`, `--no-switch`,
// repeated flags, sizes with k/M/G suffixes (of 1024), durations (`500ms`, `30s`, `5m`), and each
// flag also as an environment variable: --max-running is LONGSPAN_MAX_RUNNING. The command line
// wins over it.
//
// Usage: declare each flag with the variable that holds its default, then Parse. Targets outlive
// the set. Not thread-safe.
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace longspan {

class Flags {
 public:
  // `command` is "serve"; `arguments` what the usage line shows after it, such as "[flags] MODEL";
  // `about` a short paragraph that --help begins with.
  Flags(std::string command, std::string arguments, std::string about);

  // `placeholder` names the value in --help; `help` says what it does and, in brackets or a clause,
  // why the default is what it is. The default is read from *target now.
  void String(std::string name, std::string* target, std::string placeholder, std::string help);
  void Strings(std::string name, std::vector<std::string>* target, std::string placeholder,
               std::string help);  // may be repeated; the first use replaces the default
  void Int(std::string name, int* target, std::string help, int64_t min = 0,
           int64_t max = INT32_MAX);  // 4k is 4096
  void Int64(std::string name, int64_t* target, std::string help, int64_t min = 0,
             int64_t max = INT64_MAX);
  void Bytes(std::string name, int64_t* target, std::string help);  // 512M, 2GiB
  void Ints(std::string name, std::vector<int64_t>* target, std::string placeholder,
            std::string help);  // comma-separated: 1k,2k,4k
  void Doubles(std::string name, std::vector<double>* target, std::string placeholder,
               std::string help);  // comma-separated
  void Double(std::string name, double* target, std::string help);
  void Bool(std::string name, bool* target, std::string help);
  void Duration(std::string name, absl::Duration* target, std::string help);
  void Choice(std::string name, std::string* target, std::vector<std::string> choices,
              std::string help);
  // The declared flag is set by this environment variable instead: for a name that means another
  // thing in another command that the same environment reaches.
  void Variable(absl::string_view name, std::string variable);
  void Section(std::string title);  // a heading for the flags that follow
  void Epilogue(std::string text);  // examples and notes at the end of --help

  // Reads the environment, then argv[1..argc). Returns the exit status if the command should end at
  // once: 0 after --help (printed to stdout), 2 after a mistake (told on stderr, with the nearest
  // flag). Arguments that are not flags, and all after `--`, go to *positional; without it they are
  // a mistake.
  std::optional<int> Parse(int argc, char** argv, std::vector<std::string>* positional = nullptr);

  // What Parse does, without printing; for tests. `environment` returns nullptr when a name is not
  // set.
  using Environment = std::function<const char*(const char* name)>;
  absl::Status Read(absl::Span<const std::string> arguments, const Environment& environment,
                    std::vector<std::string>* positional, bool* help);
  std::string Help() const;

  bool IsSet(absl::string_view name) const;  // by the command line or the environment

 private:
  struct Flag {
    std::string name, placeholder, help, default_text, variable;
    bool own_variable = false;  // not the one that the name makes
    bool is_switch = false;
    bool set = false;
    std::function<absl::Status(absl::string_view value)> assign;
    std::function<void()> restart;  // repeated flags: forget what the environment gave
  };
  struct Heading {
    size_t before;  // index of the flag that follows
    std::string title;
  };
  Flag& Declare(std::string name, std::string placeholder, std::string help,
                std::string default_text);
  Flag* Find(absl::string_view name);
  absl::Status Unknown(absl::string_view name) const;
  absl::Status ReadEnvironment(const Environment& environment);

  std::string command_, arguments_, about_, epilogue_;
  std::vector<Flag> flags_;
  std::vector<Heading> headings_;
};

// "4k" -> 4096, "1.5M" -> 1572864, "12" -> 12; suffixes k, M, G, T in either case, and for bytes
// also "KiB" and "KB" forms. InvalidArgument names the value.
absl::StatusOr<int64_t> ParseSize(absl::string_view text);
absl::StatusOr<double> ParseNumber(absl::string_view text);            // finite
absl::StatusOr<absl::Duration> ParseDuration(absl::string_view text);  // a bare number is seconds
std::string FormatSize(int64_t value);  // 4096 -> "4k", 1000 -> "1000"

}  // namespace longspan
