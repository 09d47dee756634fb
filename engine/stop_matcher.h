#pragma once
// Finds stop strings in text that arrives in pieces, and holds back what may yet become one. Where
// the pieces are cut changes nothing: the stop string that is complete first ends the text, the
// longest of those that end at the same byte.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"

namespace longspan {

class StopMatcher {
 public:
  // stops: not empty each, valid UTF-8; then what is held back begins at a character.
  StopMatcher(std::vector<std::string> stops, bool include_stop)
      : stops_(std::move(stops)), include_stop_(include_stop) {}

  struct Found {
    std::string text;                 // safe to show now
    std::optional<std::string> stop;  // the stop string that ended it
  };
  // may_stop == false: a stop string that ends inside `text` is passed over for good. Not to be
  // called again once `stop` was set.
  Found Append(absl::string_view text, bool may_stop);
  // What was held back, when no more text comes.
  std::string Flush() { return std::exchange(held_, {}); }

 private:
  const std::string* FirstToEnd(size_t after, size_t* end) const;
  size_t HeldSuffix() const;  // length of held_'s longest suffix that begins a stop string

  std::vector<std::string> stops_;
  bool include_stop_;
  std::string held_;
};

}  // namespace longspan
