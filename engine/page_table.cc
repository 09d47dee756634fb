#include "engine/page_table.h"

#include <algorithm>

#include "absl/container/flat_hash_map.h"
#include "kernels/check.h"
#include "kernels/kv_view.h"

namespace longspan {

PageTable::PageTable(Backend& backend, Arena* arena, int64_t page_bytes, int slots,
                     int max_sequences)
    : backend_(backend),
      arena_(arena),
      pool_(arena, page_bytes),
      slots_(slots),
      tables_(max_sequences),
      waste_{{arena->WastePage()}, 0},
      device_(backend.Allocate(sizeof(int32_t) * slots * max_sequences)),
      uploaded_(max_sequences) {
  for (Table& table : tables_) table.pages.reserve(slots);
}

bool PageTable::SharedAt(const Table& table, int slot) const {
  return slot < static_cast<int>(table.pages.size()) && pool_.References(table.pages[slot]) > 1;
}

int64_t PageTable::NewPages(SequenceId sequence, int64_t begin, int64_t end) const {
  const Table& table = tables_[sequence];
  int64_t pages = std::max<int64_t>(0, PagesFor(end) - static_cast<int64_t>(table.pages.size()));
  ForEachWrite(begin, end, [&](Write write) { pages += SharedAt(table, write.slot); });
  return pages;
}

void PageTable::Prepare(SequenceId sequence, int64_t begin, int64_t end) {
  Table& table = tables_[sequence];
  ForEachWrite(begin, end, [&](Write write) {
    if (!SharedAt(table, write.slot)) return;
    const int32_t shared = table.pages[write.slot];
    const int32_t own = pool_.Take();
    CHECK_GE(own, 0);
    if (write.kept) CopyPage(shared, own);
    pool_.Unref(shared);
    table.pages[write.slot] = own;
    table.version = ++versions_;
  });
  while (static_cast<int>(table.pages.size()) < PagesFor(end)) {
    const int32_t page = pool_.Take();
    CHECK_GE(page, 0);
    table.pages.push_back(page);
  }
}

void PageTable::Share(SequenceId from, SequenceId to, int64_t tokens) {
  const std::vector<int32_t>& pages = tables_[from].pages;
  CHECK(tables_[to].pages.empty());
  tables_[to].pages.assign(pages.begin(), pages.begin() + PagesFor(tokens));
  for (int32_t page : tables_[to].pages) pool_.Ref(page);
}

void PageTable::Clear(SequenceId sequence) {
  Table& table = tables_[sequence];
  for (int32_t page : table.pages) pool_.Unref(page);
  table.pages.clear();
  table.version = ++versions_;
}

void PageTable::Compact() {
  absl::flat_hash_map<int32_t, int32_t> moved;
  for (const auto& [from, to] : pool_.Evacuate()) {
    CopyPage(from, to);
    moved[from] = to;
  }
  for (Table& table : tables_) {
    for (int32_t& page : table.pages) {
      const auto move = moved.find(page);
      if (move == moved.end()) continue;
      page = move->second;
      table.version = ++versions_;
    }
  }
}

void PageTable::CopyPage(int32_t from, int32_t to) {
  backend_.CopyWithin(arena_->data() + to * kPageUnitBytes, arena_->data() + from * kPageUnitBytes,
                      pool_.page_bytes());
}

void PageTable::Upload(const std::vector<SequenceId>& sequences) {
  CHECK_LE(sequences.size(), uploaded_.size());
  for (size_t i = 0; i < sequences.size(); ++i) {
    const Table& table = sequences[i] == kNoSequence ? waste_ : tables_[sequences[i]];
    Row& row = uploaded_[i];
    const bool grown = row.sequence == sequences[i] && row.version == table.version;
    const size_t begin = grown ? row.pages : 0;
    if (begin < table.pages.size()) {
      backend_.CopyIn(device_.data() + sizeof(int32_t) * (i * slots_ + begin),
                      table.pages.data() + begin, sizeof(int32_t) * (table.pages.size() - begin));
    }
    row = {sequences[i], table.version, table.pages.size()};
  }
}

}  // namespace longspan
