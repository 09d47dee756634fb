#include "engine/paged_cache.h"

namespace longspan {

PagedCache::PagedCache(Backend& backend, Arena* arena, int64_t page_bytes, int page_tokens,
                       int max_context, int max_sequences)
    : PageTable(backend, arena, page_bytes, (max_context + page_tokens - 1) / page_tokens,
                max_sequences),
      page_tokens_(page_tokens) {}

int PagedCache::PagesFor(int64_t tokens) const {
  return static_cast<int>((tokens + page_tokens_ - 1) / page_tokens_);
}

void PagedCache::ForEachWrite(int64_t begin, int64_t end,
                              absl::FunctionRef<void(Write)> visit) const {
  // Only a page that other sequences read can be shared, and of those only the last is written.
  if (begin >= end || begin % page_tokens_ == 0) return;
  visit({static_cast<int>(begin / page_tokens_), /*kept=*/true});
}

}  // namespace longspan
