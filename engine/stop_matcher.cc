#include "engine/stop_matcher.h"

#include <algorithm>

namespace longspan {

StopMatcher::Found StopMatcher::Append(absl::string_view text, bool may_stop) {
  const size_t seen = held_.size();
  held_.append(text.data(), text.size());
  Found found;
  size_t end = 0;
  const std::string* match = may_stop ? FirstToEnd(seen, &end) : nullptr;
  if (match != nullptr) {
    found.text = held_.substr(0, include_stop_ ? end : end - match->size());
    found.stop = *match;
    held_.clear();
    return found;
  }
  const size_t shown = held_.size() - HeldSuffix();
  found.text = held_.substr(0, shown);
  held_.erase(0, shown);
  return found;
}

// The stop string whose end comes first in held_, beyond its first `after` bytes.
const std::string* StopMatcher::FirstToEnd(size_t after, size_t* end) const {
  const std::string* first = nullptr;
  for (const std::string& stop : stops_) {
    const size_t from = after >= stop.size() ? after - stop.size() + 1 : 0;
    const size_t at = held_.find(stop, from);
    if (at == std::string::npos) continue;
    const size_t ends = at + stop.size();
    const bool longer = first != nullptr && ends == *end && stop.size() > first->size();
    if (first == nullptr || ends < *end || longer) {
      first = &stop;
      *end = ends;
    }
  }
  return first;
}

size_t StopMatcher::HeldSuffix() const {
  size_t longest = 0;
  for (const std::string& stop : stops_) {
    for (size_t n = std::min(stop.size() - 1, held_.size()); n > longest; --n) {
      if (held_.compare(held_.size() - n, n, stop, 0, n) == 0) longest = n;
    }
  }
  return longest;
}

}  // namespace longspan
