#include "server/api_keys.h"

#include <algorithm>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace longspan {
namespace {

constexpr size_t kShortestSecret = 16, kLongestSecret = 512;

absl::Status ReadSecret(absl::string_view word, ApiKey* key) {
  if (word.size() < kShortestSecret || word.size() > kLongestSecret) {
    return absl::InvalidArgumentError(absl::StrCat("the key has ", word.size(),
                                                   " characters, must have from ", kShortestSecret,
                                                   " to ", kLongestSecret));
  }
  // What an HTTP header can carry.
  if (!std::all_of(word.begin(), word.end(), absl::ascii_isgraph)) {
    return absl::InvalidArgumentError("the key has characters that are not printable ASCII");
  }
  key->secret = std::string(word);
  return absl::OkStatus();
}

absl::Status ReadOption(absl::string_view word, ApiKey* key) {
  if (word == "admin") {
    key->admin = true;
    return absl::OkStatus();
  }
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(word, absl::MaxSplits('=', 1));
  const auto [option, value] = parts;
  if (option == "name" && !value.empty()) {
    key->name = std::string(value);
    return absl::OkStatus();
  }
  if (option == "max-requests" || option == "tokens-per-minute") {
    int64_t& limit = option == "max-requests" ? key->max_requests : key->tokens_per_minute;
    if (absl::SimpleAtoi(value, &limit) && limit > 0) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(option, " is '", value, "', must be a whole number above 0"));
  }
  // Not the word itself: it may be a secret with a space in it.
  return absl::InvalidArgumentError(
      "after the key come name=NAME, admin, max-requests=N, tokens-per-minute=N; one word is none "
      "of them");
}

}  // namespace

absl::StatusOr<std::vector<ApiKey>> ParseApiKeys(absl::string_view text, absl::string_view file) {
  std::vector<ApiKey> keys;
  std::set<std::string> secrets, names;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    const auto Bad = [&](absl::string_view why) {
      return absl::InvalidArgumentError(absl::StrCat(file, ":", number, ": ", why));
    };
    const std::vector<absl::string_view> words =
        absl::StrSplit(line.substr(0, line.find('#')), absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty()) continue;
    ApiKey key;
    key.name = absl::StrCat("key-", number);
    absl::Status read = ReadSecret(words[0], &key);
    for (size_t i = 1; i < words.size() && read.ok(); ++i) read = ReadOption(words[i], &key);
    if (!read.ok()) return Bad(read.message());
    if (!secrets.insert(key.secret).second) return Bad("the key is on an earlier line too");
    if (!names.insert(key.name).second) {
      return Bad(absl::StrCat("the name '", key.name, "' is on an earlier line too"));
    }
    keys.push_back(std::move(key));
  }
  if (keys.empty()) return absl::InvalidArgumentError(absl::StrCat(file, ": has no key"));
  return keys;
}

bool SameSecret(absl::string_view secret, absl::string_view guess) {
  unsigned difference = secret.size() != guess.size();
  for (size_t i = 0; i < guess.size(); ++i) {
    difference |= static_cast<unsigned char>(secret[i % secret.size()]) ^
                  static_cast<unsigned char>(guess[i]);
  }
  return difference == 0;
}

}  // namespace longspan
