#pragma once
// All cache memory: one allocation cut into superblocks, which page pools lease and return. No
// padding between kinds, no ratios: memory follows the load. Used on the engine thread.
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/kv_view.h"

namespace longspan {

class Arena {
 public:
  static constexpr int64_t kSuperblockFloor = int64_t{2} << 20;

  // The smallest superblock of at least `floor_bytes` that is whole in the largest page and of
  // which no page size wastes more than 1/64. Page sizes are multiples of kPageUnitBytes; 0 stands
  // for a kind that the model lacks.
  static int64_t SuperblockBytes(const std::vector<int64_t>& page_bytes,
                                 int64_t floor_bytes = kSuperblockFloor);
  // As many superblocks as `bytes` holds, and behind them `waste_bytes` that are never leased.
  // ResourceExhausted with both numbers if that is none, if page ids cannot count so far, or if the
  // backend has not the memory.
  static absl::StatusOr<Arena> Create(Backend& backend, int64_t bytes, int64_t superblock_bytes,
                                      int64_t waste_bytes = 0);

  std::byte* data() const { return buffer_.data(); }
  int64_t superblock_bytes() const { return superblock_bytes_; }
  int total() const { return total_; }
  int free() const { return static_cast<int>(free_.size()); }
  bool leased(int superblock) const { return leased_[superblock]; }
  // Where what nobody reads is written.
  int32_t WastePage() const {
    return static_cast<int32_t>(total_ * superblock_bytes_ / kPageUnitBytes);
  }

  int Lease();  // -1 when none is free
  void Return(int superblock);
  absl::Status CheckIntegrity() const;

 private:
  friend class CacheTestPeer;

  Arena(Buffer buffer, int64_t superblock_bytes, int total);

  Buffer buffer_;
  int64_t superblock_bytes_ = 0;
  int total_ = 0;
  std::vector<int> free_;  // LIFO: the warmest first
  std::vector<bool> leased_;
};

}  // namespace longspan
