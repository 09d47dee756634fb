#include "engine/arena.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longspan {

int64_t Arena::SuperblockBytes(const std::vector<int64_t>& page_bytes, int64_t floor_bytes) {
  int64_t largest = kPageUnitBytes;
  for (int64_t bytes : page_bytes) largest = std::max(largest, bytes);
  const auto wasteful = [&](int64_t superblock) {
    return std::any_of(page_bytes.begin(), page_bytes.end(), [&](int64_t page) {
      return page > 0 && superblock % page > superblock / 64;
    });
  };
  // Ends: a page wastes less than itself, so 64 of the largest are always enough.
  int64_t superblock = std::max<int64_t>(1, (floor_bytes + largest - 1) / largest) * largest;
  while (wasteful(superblock)) superblock += largest;
  return superblock;
}

absl::StatusOr<Arena> Arena::Create(Backend& backend, int64_t bytes, int64_t superblock_bytes,
                                    int64_t waste_bytes) {
  CHECK_EQ(superblock_bytes % kPageUnitBytes, 0);
  const int64_t total = bytes / superblock_bytes;
  if (total < 1) {
    return absl::ResourceExhaustedError(absl::StrCat("a cache of ", bytes,
                                                     " bytes does not hold one superblock of ",
                                                     superblock_bytes, " bytes"));
  }
  const int64_t most = std::numeric_limits<int32_t>::max() * kPageUnitBytes;
  if (bytes > most) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a cache of ", bytes, " bytes is beyond the limit of ", most, " bytes"));
  }
  // In whole 2 MiB: only such does Linux map to huge pages from the first byte on.
  const int64_t needed = total * superblock_bytes + waste_bytes;
  Buffer buffer =
      backend.Allocate((needed + kSuperblockFloor - 1) / kSuperblockFloor * kSuperblockFloor);
  if (buffer.data() == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no memory for a cache of ", total * superblock_bytes, " bytes"));
  }
  return Arena(std::move(buffer), superblock_bytes, static_cast<int>(total));
}

Arena::Arena(Buffer buffer, int64_t superblock_bytes, int total)
    : buffer_(std::move(buffer)),
      superblock_bytes_(superblock_bytes),
      total_(total),
      leased_(total, false) {
  free_.reserve(total);
  for (int i = total - 1; i >= 0; --i) free_.push_back(i);
}

int Arena::Lease() {
  if (free_.empty()) return -1;
  const int superblock = free_.back();
  free_.pop_back();
  leased_[superblock] = true;
  return superblock;
}

void Arena::Return(int superblock) {
  CHECK(leased_[superblock]) << "superblock " << superblock << " is not leased";
  leased_[superblock] = false;
  free_.push_back(superblock);
}

absl::Status Arena::CheckIntegrity() const {
  std::vector<bool> free(total_, false);
  for (int superblock : free_) {
    if (leased_[superblock] || free[superblock]) {
      return absl::InternalError(absl::StrCat("superblock ", superblock, " is free ",
                                              free[superblock] ? "twice" : "and leased"));
    }
    free[superblock] = true;
  }
  const int leased = static_cast<int>(std::count(leased_.begin(), leased_.end(), true));
  if (leased + this->free() != total_) {
    return absl::InternalError(absl::StrCat(leased, " leased + ", this->free(),
                                            " free superblocks are not the arena's ", total_));
  }
  return absl::OkStatus();
}

}  // namespace longspan
