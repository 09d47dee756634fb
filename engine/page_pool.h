#pragma once
// Reference-counted pages of one size, carved from superblocks that are leased from an Arena as
// needed and returned when empty. A page id is the page's distance from the arena's start in
// kPageUnitBytes, as KvView tables hold it. Used on the engine thread.
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "engine/arena.h"

namespace longspan {

class PagePool {
 public:
  PagePool(Arena* arena, int64_t page_bytes);  // page_bytes is a multiple of kPageUnitBytes

  int64_t page_bytes() const { return page_bytes_; }
  int pages_per_superblock() const { return pages_per_superblock_; }
  int leased() const { return leased_; }  // superblocks
  int used() const { return used_; }      // pages with references
  // Pages that it can hand out as things lie, counting all free superblocks.
  int available() const;
  // How many more superblocks `pages` further pages would lease.
  int SuperblocksFor(int64_t pages) const;

  int32_t Take();  // with one reference; -1 when nothing is left
  void Ref(int32_t page);
  void Unref(int32_t page);            // frees at zero; an empty superblock goes back to the arena
  int References(int32_t page) const;  // 0 for what is no page of this pool

  // Gives back the emptiest superblock: plans its pages into the holes of the others and returns
  // the moves (from, to). References move along; the caller copies the bytes and mends its tables
  // before it takes another page. Needs used() <= (leased() - 1) * pages_per_superblock().
  using Move = std::pair<int32_t, int32_t>;
  std::vector<Move> Evacuate();

  bool Owns(int superblock) const { return superblocks_[superblock].leased; }
  absl::Status CheckIntegrity() const;

 private:
  friend class CacheTestPeer;

  struct Superblock {
    std::vector<int> references;  // per page; empty when not leased
    std::vector<int> free;        // LIFO
    int partly_index = -1;        // where it stands in partly_free_
    bool leased = false;
    int used() const { return static_cast<int>(references.size() - free.size()); }
  };
  struct Place {
    int superblock, page;
  };

  std::optional<Place> Find(int32_t page) const;
  Place Locate(int32_t page) const;  // CHECKs that it is there
  int32_t IdOf(Place place) const;
  int32_t TakeFrom(int superblock);
  void MarkPartlyFree(int superblock);
  void UnmarkPartlyFree(int superblock);
  void GiveBack(int superblock);

  Arena* arena_;
  int64_t page_bytes_;
  int pages_per_superblock_;
  int leased_ = 0;
  int used_ = 0;
  std::vector<Superblock> superblocks_;  // indexed by the arena's superblock number
  std::vector<int> partly_free_;         // leased superblocks with at least one free page
};

}  // namespace longspan
