#include "engine/ring_cache.h"

#include <algorithm>

namespace longspan {

RingCache::RingCache(Backend& backend, Arena* arena, int64_t page_bytes, int page_tokens,
                     int window, int max_sequences)
    : PageTable(backend, arena, page_bytes, SlotsOf(window, page_tokens), max_sequences),
      page_tokens_(page_tokens),
      window_(window) {}

int RingCache::SlotsOf(int window, int page_tokens) {
  return (window - 1 + page_tokens - 1) / page_tokens + 1;
}

int RingCache::PagesFor(int64_t tokens) const {
  const int64_t pages = (tokens + page_tokens_ - 1) / page_tokens_;
  return static_cast<int>(std::min<int64_t>(pages, slots()));
}

void RingCache::ForEachWrite(int64_t begin, int64_t end,
                             absl::FunctionRef<void(Write)> visit) const {
  if (begin >= end) return;
  const int64_t newest = (begin - 1) / page_tokens_;  // page of the last cached position
  const int64_t first = std::max(begin, end - window_) / page_tokens_;
  for (int64_t page = first; page <= (end - 1) / page_tokens_; ++page) {
    const int slot = static_cast<int>(page % slots());
    // What the slot holds: the newest page that maps to it. The step's first query sees the cached
    // positions after begin - W; if none of those is here, the page is only overwritten.
    const int64_t held = newest - (newest - slot + slots()) % slots();
    const int64_t last_held = std::min((held + 1) * page_tokens_, begin) - 1;
    visit({slot, /*kept=*/begin > 0 && held >= 0 && last_held > begin - window_});
  }
}

}  // namespace longspan
