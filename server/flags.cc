#include "server/flags.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/check.h"

namespace longspan {
namespace {

constexpr size_t kHelpWidth = 96;
constexpr size_t kHelpIndent = 6;

std::string EnvironmentName(absl::string_view flag) {
  return absl::StrCat("LONGSPAN_", absl::AsciiStrToUpper(absl::StrReplaceAll(flag, {{"-", "_"}})));
}

absl::Status OutOfRange(int64_t value, int64_t min, int64_t max) {
  return absl::InvalidArgumentError(
      absl::StrCat(value, " is out of range; it must be between ", min, " and ", max));
}

// Edit distance, for suggestions.
size_t Distance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t replaced = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, replaced});
    }
  }
  return row[b.size()];
}

std::string Wrap(absl::string_view text, size_t indent) {
  std::string out;
  for (absl::string_view paragraph : absl::StrSplit(text, '\n')) {
    size_t column = 0;
    for (absl::string_view word : absl::StrSplit(paragraph, ' ', absl::SkipEmpty())) {
      if (column > 0 && column + 1 + word.size() > kHelpWidth) {
        out += '\n';
        column = 0;
      }
      if (column == 0) {
        out.append(indent, ' ');
        column = indent;
      } else {
        out += ' ';
        ++column;
      }
      absl::StrAppend(&out, word);
      column += word.size();
    }
    out += '\n';
  }
  return out;
}

template <class T>
absl::StatusOr<std::vector<T>> ParseList(absl::string_view text,
                                         absl::StatusOr<T> (*parse)(absl::string_view)) {
  std::vector<T> values;
  for (absl::string_view part : absl::StrSplit(text, ',')) {
    absl::StatusOr<T> value = parse(absl::StripAsciiWhitespace(part));
    if (!value.ok()) return value.status();
    values.push_back(*value);
  }
  return values;
}

}  // namespace

absl::StatusOr<double> ParseNumber(absl::string_view text) {
  double value = 0;
  if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) {
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is not a number"));
  }
  return value;
}

absl::StatusOr<int64_t> ParseSize(absl::string_view text) {
  static constexpr absl::string_view kUnits = "kmgt";
  absl::string_view digits = text;
  if (digits.size() > 1 && absl::ascii_tolower(digits.back()) == 'b') digits.remove_suffix(1);
  if (digits.size() > 1 && absl::ascii_tolower(digits.back()) == 'i') digits.remove_suffix(1);
  int64_t factor = 1;
  if (!digits.empty()) {
    const size_t unit = kUnits.find(absl::ascii_tolower(digits.back()));
    if (unit != absl::string_view::npos) {
      factor = int64_t{1} << (10 * (unit + 1));
      digits.remove_suffix(1);
    }
  }
  int64_t whole = 0;
  if (factor == 1 && digits.size() == text.size() && absl::SimpleAtoi(digits, &whole)) return whole;
  double value = 0;
  if (digits.empty() || digits.find_first_not_of("-0123456789.") != absl::string_view::npos ||
      !absl::SimpleAtod(digits, &value) || !std::isfinite(value) ||
      std::abs(value) * static_cast<double>(factor) >= 9.2e18 ||
      std::floor(value * static_cast<double>(factor)) != value * static_cast<double>(factor)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "'", text, "' is not a whole number (suffixes k, M, G mean 1024, 1024^2, 1024^3)"));
  }
  return static_cast<int64_t>(value * static_cast<double>(factor));
}

absl::StatusOr<absl::Duration> ParseDuration(absl::string_view text) {
  double seconds = 0;
  absl::Duration duration;
  if (absl::SimpleAtod(text, &seconds)) {
    if (std::isfinite(seconds) && seconds >= 0) return absl::Seconds(seconds);
  } else if (absl::ParseDuration(text, &duration) && duration >= absl::ZeroDuration()) {
    return duration;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("'", text, "' is not a duration such as 500ms, 30s or 5m"));
}

std::string FormatSize(int64_t value) {
  static constexpr absl::string_view kUnits = "kMGT";
  if (value == 0) return "0";
  int unit = -1;
  while (unit + 1 < static_cast<int>(kUnits.size()) && value % 1024 == 0) {
    value /= 1024;
    ++unit;
  }
  return unit < 0 ? absl::StrCat(value) : absl::StrCat(value, kUnits.substr(unit, 1));
}

Flags::Flags(std::string command, std::string arguments, std::string about)
    : command_(std::move(command)), arguments_(std::move(arguments)), about_(std::move(about)) {}

Flags::Flag& Flags::Declare(std::string name, std::string placeholder, std::string help,
                            std::string default_text) {
  CHECK(Find(name) == nullptr) << "flag --" << name << " is declared twice";
  Flag& flag = flags_.emplace_back();
  flag.name = std::move(name);
  flag.placeholder = std::move(placeholder);
  flag.help = std::move(help);
  flag.default_text = std::move(default_text);
  flag.variable = EnvironmentName(flag.name);
  return flag;
}

void Flags::String(std::string name, std::string* target, std::string placeholder,
                   std::string help) {
  Declare(std::move(name), std::move(placeholder), std::move(help), *target).assign =
      [target](absl::string_view value) {
        *target = std::string(value);
        return absl::OkStatus();
      };
}

void Flags::Strings(std::string name, std::vector<std::string>* target, std::string placeholder,
                    std::string help) {
  Flag& flag = Declare(std::move(name), std::move(placeholder),
                       absl::StrCat(help, " May be repeated."), absl::StrJoin(*target, ", "));
  flag.assign = [target](absl::string_view value) {
    target->push_back(std::string(value));
    return absl::OkStatus();
  };
  flag.restart = [target] { target->clear(); };
}

void Flags::Int64(std::string name, int64_t* target, std::string help, int64_t min, int64_t max) {
  Declare(std::move(name), "N", std::move(help), FormatSize(*target)).assign =
      [=](absl::string_view text) -> absl::Status {
    absl::StatusOr<int64_t> value = ParseSize(text);
    if (!value.ok()) return value.status();
    if (*value < min || *value > max) return OutOfRange(*value, min, max);
    *target = *value;
    return absl::OkStatus();
  };
}

void Flags::Int(std::string name, int* target, std::string help, int64_t min, int64_t max) {
  Declare(std::move(name), "N", std::move(help), FormatSize(*target)).assign =
      [=](absl::string_view text) -> absl::Status {
    absl::StatusOr<int64_t> value = ParseSize(text);
    if (!value.ok()) return value.status();
    if (*value < min || *value > max) return OutOfRange(*value, min, max);
    *target = static_cast<int>(*value);
    return absl::OkStatus();
  };
}

void Flags::Bytes(std::string name, int64_t* target, std::string help) {
  Int64(std::move(name), target, std::move(help));
  flags_.back().placeholder = "BYTES";
}

void Flags::Ints(std::string name, std::vector<int64_t>* target, std::string placeholder,
                 std::string help) {
  std::vector<std::string> defaults;
  for (int64_t value : *target) defaults.push_back(FormatSize(value));
  Declare(std::move(name), std::move(placeholder), std::move(help), absl::StrJoin(defaults, ","))
      .assign = [target](absl::string_view text) -> absl::Status {
    absl::StatusOr<std::vector<int64_t>> values = ParseList<int64_t>(text, &ParseSize);
    if (!values.ok()) return values.status();
    *target = *std::move(values);
    return absl::OkStatus();
  };
}

void Flags::Doubles(std::string name, std::vector<double>* target, std::string placeholder,
                    std::string help) {
  Declare(std::move(name), std::move(placeholder), std::move(help), absl::StrJoin(*target, ","))
      .assign = [target](absl::string_view text) -> absl::Status {
    absl::StatusOr<std::vector<double>> values = ParseList<double>(text, &ParseNumber);
    if (!values.ok()) return values.status();
    *target = *std::move(values);
    return absl::OkStatus();
  };
}

void Flags::Double(std::string name, double* target, std::string help) {
  Declare(std::move(name), "X", std::move(help), absl::StrCat(*target)).assign =
      [target](absl::string_view text) -> absl::Status {
    absl::StatusOr<double> value = ParseNumber(text);
    if (!value.ok()) return value.status();
    *target = *value;
    return absl::OkStatus();
  };
}

void Flags::Bool(std::string name, bool* target, std::string help) {
  Flag& flag = Declare(std::move(name), "", std::move(help), *target ? "on" : "");
  flag.is_switch = true;
  flag.assign = [target](absl::string_view text) {
    if (absl::SimpleAtob(text, target)) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("'", text, "' is neither true nor false"));
  };
}

void Flags::Duration(std::string name, absl::Duration* target, std::string help) {
  Declare(std::move(name), "TIME", std::move(help), absl::FormatDuration(*target)).assign =
      [target](absl::string_view text) -> absl::Status {
    absl::StatusOr<absl::Duration> value = ParseDuration(text);
    if (!value.ok()) return value.status();
    *target = *value;
    return absl::OkStatus();
  };
}

void Flags::Choice(std::string name, std::string* target, std::vector<std::string> choices,
                   std::string help) {
  Declare(std::move(name), absl::StrJoin(choices, "|"), std::move(help), *target).assign =
      [target, choices](absl::string_view text) {
        if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
          return absl::InvalidArgumentError(
              absl::StrCat("'", text, "' is not one of ", absl::StrJoin(choices, ", ")));
        }
        *target = std::string(text);
        return absl::OkStatus();
      };
}

void Flags::Variable(absl::string_view name, std::string variable) {
  Flag* flag = Find(name);
  CHECK(flag != nullptr) << "flag --" << name << " is not declared";
  flag->variable = std::move(variable);
  flag->own_variable = true;
}

void Flags::Section(std::string title) { headings_.push_back({flags_.size(), std::move(title)}); }

void Flags::Epilogue(std::string text) { epilogue_ = std::move(text); }

Flags::Flag* Flags::Find(absl::string_view name) {
  for (Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

bool Flags::IsSet(absl::string_view name) const {
  for (const Flag& flag : flags_) {
    if (flag.name == name) return flag.set;
  }
  return false;
}

absl::Status Flags::Unknown(absl::string_view name) const {
  std::string message = absl::StrCat("unknown flag --", name);
  const Flag* nearest = nullptr;
  size_t best = 0;
  for (const Flag& flag : flags_) {
    const size_t distance = absl::StartsWith(flag.name, name) ? 0 : Distance(name, flag.name);
    if (nearest == nullptr || distance < best) {
      nearest = &flag;
      best = distance;
    }
  }
  if (nearest != nullptr && best <= std::max<size_t>(2, name.size() / 3)) {
    absl::StrAppend(&message, "; did you mean --", nearest->name, "?");
  }
  return absl::InvalidArgumentError(message);
}

absl::Status Flags::ReadEnvironment(const Environment& environment) {
  for (Flag& flag : flags_) {
    const char* value = environment(flag.variable.c_str());
    if (value == nullptr) continue;
    if (flag.restart) flag.restart();
    if (absl::Status status = flag.assign(value); !status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("environment variable ", flag.variable, ": ", status.message()));
    }
    flag.set = true;
  }
  return absl::OkStatus();
}

absl::Status Flags::Read(absl::Span<const std::string> arguments, const Environment& environment,
                         std::vector<std::string>* positional, bool* help) {
  *help = false;
  if (absl::Status status = ReadEnvironment(environment); !status.ok()) return status;
  std::vector<const Flag*> restarted;
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      *help = true;
      return absl::OkStatus();
    }
    const bool rest = argument == "--";
    if (rest || !absl::StartsWith(argument, "--")) {
      const size_t end = rest ? arguments.size() : i + 1;
      for (i = rest ? i + 1 : i; i < end; ++i) {
        if (positional == nullptr) {
          return absl::InvalidArgumentError(
              absl::StrCat("unexpected argument '", arguments[i], "'"));
        }
        positional->push_back(arguments[i]);
      }
      --i;
      continue;
    }
    argument.remove_prefix(2);
    const size_t equals = argument.find('=');
    const absl::string_view name = argument.substr(0, equals);
    Flag* flag = Find(name);
    std::string value;
    if (flag == nullptr && absl::StartsWith(name, "no-") && equals == absl::string_view::npos) {
      flag = Find(name.substr(3));
      if (flag != nullptr && !flag->is_switch) flag = nullptr;
      value = "false";
    }
    if (flag == nullptr) return Unknown(name);
    if (equals != absl::string_view::npos) {
      value = std::string(argument.substr(equals + 1));
    } else if (flag->is_switch) {
      if (value.empty()) value = "true";
    } else if (++i < arguments.size()) {
      value = arguments[i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
    }
    if (flag->restart && std::find(restarted.begin(), restarted.end(), flag) == restarted.end()) {
      flag->restart();
      restarted.push_back(flag);
    }
    if (absl::Status status = flag->assign(value); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--", flag->name, ": ", status.message()));
    }
    flag->set = true;
  }
  return absl::OkStatus();
}

std::string Flags::Help() const {
  std::string out =
      absl::StrCat("usage: longspan ", command_, arguments_.empty() ? "" : " ", arguments_, "\n\n");
  if (!about_.empty()) absl::StrAppend(&out, Wrap(about_, 0), "\n");
  size_t heading = 0;
  if (headings_.empty() || headings_[0].before > 0) out += "flags:\n";
  for (size_t i = 0; i <= flags_.size(); ++i) {
    while (heading < headings_.size() && headings_[heading].before == i) {
      absl::StrAppend(&out, i == 0 ? "" : "\n", headings_[heading++].title, ":\n");
    }
    if (i == flags_.size()) break;
    const Flag& flag = flags_[i];
    absl::StrAppend(&out, "  --", flag.name, flag.placeholder.empty() ? "" : " ", flag.placeholder,
                    "\n");
    std::string text = flag.help;
    if (!flag.default_text.empty()) absl::StrAppend(&text, " [", flag.default_text, "]");
    if (flag.own_variable) absl::StrAppend(&text, " (", flag.variable, ")");
    absl::StrAppend(&out, Wrap(text, kHelpIndent));
  }
  absl::StrAppend(
      &out, "  --help\n", Wrap("Print this.", kHelpIndent), "\n",
      Wrap("Each flag can also be set by an environment variable, LONGSPAN_ and its name "
           "in capitals with _ for - where no other is told; the command line wins. Sizes take the "
           "suffixes k, "
           "M, G (of 1024), times take ms, s, m, h.",
           0));
  if (!epilogue_.empty()) absl::StrAppend(&out, "\n", epilogue_, "\n");
  return out;
}

std::optional<int> Flags::Parse(int argc, char** argv, std::vector<std::string>* positional) {
  const std::vector<std::string> arguments(argv + std::min(argc, 1), argv + argc);
  bool help = false;
  const absl::Status status = Read(
      arguments, [](const char* name) { return std::getenv(name); }, positional, &help);
  if (!status.ok()) {
    std::cerr << "longspan " << command_ << ": " << status.message() << "\nTry longspan "
              << command_ << " --help\n";
    return 2;
  }
  if (!help) return std::nullopt;
  std::cout << Help();
  return 0;
}

}  // namespace longspan
