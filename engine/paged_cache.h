#pragma once
// Keys and values of full-attention layers: a sequence's page table grows by one page every
// page_tokens tokens, up to the context, and never wraps.
#include "engine/page_table.h"

namespace longspan {

class PagedCache : public PageTable {
 public:
  PagedCache(Backend& backend, Arena* arena, int64_t page_bytes, int page_tokens, int max_context,
             int max_sequences);
  int PagesFor(int64_t tokens) const override;

 private:
  void ForEachWrite(int64_t begin, int64_t end,
                    absl::FunctionRef<void(Write)> visit) const override;
  int page_tokens_;
};

}  // namespace longspan
