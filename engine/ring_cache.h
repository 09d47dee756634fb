#pragma once
// Keys and values of window layers: a ring of ceil((W - 1) / page_tokens) + 1 pages, so that W
// consecutive positions lie in it wherever they begin. Position p is in slot (p / page_tokens) %
// slots.
//
// A step that computes [begin, end) first reads the ring as [0, begin) left it, then writes the
// last W of its own positions. So a ring never holds more than W tokens and a page, whatever the
// chunk size.
#include "engine/page_table.h"

namespace longspan {

class RingCache : public PageTable {
 public:
  RingCache(Backend& backend, Arena* arena, int64_t page_bytes, int page_tokens, int window,
            int max_sequences);
  static int SlotsOf(int window, int page_tokens);
  int PagesFor(int64_t tokens) const override;

 private:
  void ForEachWrite(int64_t begin, int64_t end,
                    absl::FunctionRef<void(Write)> visit) const override;
  int page_tokens_;
  int window_;
};

}  // namespace longspan
