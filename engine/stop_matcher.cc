#include "engine/stop_matcher.h"

#include <algorithm>

namespace longspan {

StopMatcher::Found StopMatcher::Append(absl::string_view text) {
  held_.append(text.data(), text.size());
  size_t best = std::string::npos;
  const std::string* match = nullptr;
  for (const std::string& stop : stops_) {
    const size_t at = held_.find(stop);
    if (at < best || (at == best && match != nullptr && stop.size() > match->size())) {
      best = at;
      match = &stop;
    }
  }
  Found found;
  if (match != nullptr) {
    found.text = held_.substr(0, best + (include_stop_ ? match->size() : 0));
    found.stop = *match;
    held_.clear();
    return found;
  }
  const size_t keep = HeldSuffix();
  found.text = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return found;
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
