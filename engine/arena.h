#pragma once
// All cache memory: one allocation cut into superblocks, leased to page pools, each of which carves its
// superblocks into pages of its own size. No padding between kinds, no ratios: memory follows the load.
// Used on the engine thread; counts are readable from any thread through KvCache::Usage().
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace longspan {

class Arena {
 public:
  // superblock_bytes: at least 2 MiB, and such that every page size wastes at most 1/64 of it; see
  // SuperblockBytes(). ResourceExhausted with both numbers if `bytes` holds less than one superblock.
  static absl::StatusOr<Arena> Create(Backend& backend, int64_t bytes, int64_t superblock_bytes);
  static int64_t SuperblockBytes(const std::vector<int64_t>& page_bytes);

  std::byte* data() const { return buffer_.data(); }
  int64_t superblock_bytes() const { return superblock_bytes_; }
  int total() const { return total_; }
  int free() const { return static_cast<int>(free_.size()); }
  int Lease();              // -1 when none is free
  void Return(int superblock);

 private:
  Arena(Buffer buffer, int64_t superblock_bytes, int total);
  Buffer buffer_;
  int64_t superblock_bytes_ = 0;
  int total_ = 0;
  std::vector<int> free_;   // LIFO
  std::vector<bool> leased_;
};

// Reference-counted pages of one size. A page id is its distance from the arena's start in
// kPageUnitBytes, as KvView tables hold it.
class PagePool {
 public:
  PagePool(Arena* arena, int64_t page_bytes);  // page_bytes is a multiple of kPageUnitBytes
  int64_t page_bytes() const { return page_bytes_; }
  int pages_per_superblock() const { return pages_per_superblock_; }
  int used() const { return used_; }           // pages with references
  int available() const;                       // pages it could still hand out, counting free superblocks
  int32_t Take();                              // one reference; -1 when nothing is left
  void Ref(int32_t page);
  void Unref(int32_t page);                    // frees at zero; an empty superblock goes back to the arena
  int References(int32_t page) const;
  absl::Status CheckIntegrity() const;

 private:
  struct Superblock {
    std::vector<int> references;  // per page
    std::vector<int> free;
    bool leased = false;
  };
  Arena* arena_;
  int64_t page_bytes_;
  int pages_per_superblock_;
  int used_ = 0;
  std::vector<Superblock> superblocks_;   // indexed by the arena's superblock number
  std::vector<int> partly_free_;
};

}  // namespace longspan
