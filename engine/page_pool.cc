#include "engine/page_pool.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/kv_view.h"

namespace longspan {

PagePool::PagePool(Arena* arena, int64_t page_bytes)
    : arena_(arena),
      page_bytes_(page_bytes),
      pages_per_superblock_(static_cast<int>(arena->superblock_bytes() / page_bytes)),
      superblocks_(arena->total()) {
  CHECK_EQ(page_bytes % kPageUnitBytes, 0);
  CHECK_GE(pages_per_superblock_, 1);
  partly_free_.reserve(superblocks_.size());
  for (Superblock& superblock : superblocks_) {
    superblock.references.reserve(pages_per_superblock_);
    superblock.free.reserve(pages_per_superblock_);
  }
}

int PagePool::available() const {
  return (leased_ + arena_->free()) * pages_per_superblock_ - used_;
}

int PagePool::SuperblocksFor(int64_t pages) const {
  const int64_t beyond = pages - (int64_t{leased_} * pages_per_superblock_ - used_);
  if (beyond <= 0) return 0;
  return static_cast<int>((beyond + pages_per_superblock_ - 1) / pages_per_superblock_);
}

int32_t PagePool::Take() {
  if (partly_free_.empty()) {
    const int superblock = arena_->Lease();
    if (superblock < 0) return -1;
    Superblock& fresh = superblocks_[superblock];
    fresh.leased = true;
    fresh.references.assign(pages_per_superblock_, 0);
    for (int page = pages_per_superblock_ - 1; page >= 0; --page) fresh.free.push_back(page);
    MarkPartlyFree(superblock);
    ++leased_;
  }
  return TakeFrom(partly_free_.back());
}

int32_t PagePool::TakeFrom(int superblock) {
  Superblock& from = superblocks_[superblock];
  const int page = from.free.back();
  from.free.pop_back();
  from.references[page] = 1;
  if (from.free.empty()) UnmarkPartlyFree(superblock);
  ++used_;
  return IdOf({superblock, page});
}

void PagePool::Ref(int32_t page) {
  const Place at = Locate(page);
  CHECK_GT(superblocks_[at.superblock].references[at.page], 0) << "page " << page << " is free";
  ++superblocks_[at.superblock].references[at.page];
}

void PagePool::Unref(int32_t page) {
  const Place at = Locate(page);
  Superblock& superblock = superblocks_[at.superblock];
  CHECK_GT(superblock.references[at.page], 0) << "page " << page << " is free";
  if (--superblock.references[at.page] > 0) return;
  superblock.free.push_back(at.page);
  --used_;
  if (superblock.used() == 0) {
    UnmarkPartlyFree(at.superblock);
    GiveBack(at.superblock);
  } else {
    MarkPartlyFree(at.superblock);
  }
}

int PagePool::References(int32_t page) const {
  const std::optional<Place> at = Find(page);
  return at ? superblocks_[at->superblock].references[at->page] : 0;
}

std::vector<PagePool::Move> PagePool::Evacuate() {
  CHECK_LE(int64_t{used_}, int64_t{leased_ - 1} * pages_per_superblock_);
  const int emptiest = *std::min_element(
      partly_free_.begin(), partly_free_.end(),
      [&](int a, int b) { return superblocks_[a].used() < superblocks_[b].used(); });
  UnmarkPartlyFree(emptiest);
  Superblock& from = superblocks_[emptiest];
  std::vector<Move> moves;
  for (int page = 0; page < pages_per_superblock_; ++page) {
    if (from.references[page] == 0) continue;
    const int32_t target = TakeFrom(partly_free_.back());
    const Place at = Locate(target);
    superblocks_[at.superblock].references[at.page] = from.references[page];
    moves.emplace_back(IdOf({emptiest, page}), target);
  }
  used_ -= static_cast<int>(moves.size());
  GiveBack(emptiest);
  return moves;
}

std::optional<PagePool::Place> PagePool::Find(int32_t page) const {
  const int64_t offset = page * kPageUnitBytes;
  const int64_t superblock = offset / arena_->superblock_bytes();
  const int64_t within = offset % arena_->superblock_bytes();
  if (page < 0 || superblock >= arena_->total() || !superblocks_[superblock].leased ||
      within % page_bytes_ != 0 || within / page_bytes_ >= pages_per_superblock_) {
    return std::nullopt;
  }
  return Place{static_cast<int>(superblock), static_cast<int>(within / page_bytes_)};
}

PagePool::Place PagePool::Locate(int32_t page) const {
  const std::optional<Place> at = Find(page);
  CHECK(at.has_value()) << "no page has id " << page;
  return *at;
}

int32_t PagePool::IdOf(Place place) const {
  const int64_t offset = place.superblock * arena_->superblock_bytes() + place.page * page_bytes_;
  return static_cast<int32_t>(offset / kPageUnitBytes);
}

void PagePool::MarkPartlyFree(int superblock) {
  if (superblocks_[superblock].partly_index >= 0) return;
  superblocks_[superblock].partly_index = static_cast<int>(partly_free_.size());
  partly_free_.push_back(superblock);
}

void PagePool::UnmarkPartlyFree(int superblock) {
  const int index = superblocks_[superblock].partly_index;
  if (index < 0) return;
  partly_free_[index] = partly_free_.back();
  superblocks_[partly_free_[index]].partly_index = index;
  partly_free_.pop_back();
  superblocks_[superblock].partly_index = -1;
}

void PagePool::GiveBack(int superblock) {
  superblocks_[superblock].references.clear();
  superblocks_[superblock].free.clear();
  superblocks_[superblock].leased = false;
  arena_->Return(superblock);
  --leased_;
}

absl::Status PagePool::CheckIntegrity() const {
  int used = 0, leased = 0, partly_free = 0;
  for (int s = 0; s < arena_->total(); ++s) {
    const Superblock& superblock = superblocks_[s];
    if (!superblock.leased) continue;
    ++leased;
    if (!arena_->leased(s)) {
      return absl::InternalError(absl::StrCat("superblock ", s, " is in use but not leased"));
    }
    std::vector<bool> free(pages_per_superblock_, false);
    for (int page : superblock.free) {
      if (free[page]) {
        return absl::InternalError(absl::StrCat("page ", IdOf({s, page}), " is free twice"));
      }
      free[page] = true;
    }
    for (int page = 0; page < pages_per_superblock_; ++page) {
      const int references = superblock.references[page];
      if (references < 0 || (references == 0) != free[page]) {
        return absl::InternalError(absl::StrCat("page ", IdOf({s, page}), " has ", references,
                                                " references and is ",
                                                free[page] ? "free" : "not free"));
      }
      used += references > 0;
    }
    const bool listed = superblock.partly_index >= 0 &&
                        superblock.partly_index < static_cast<int>(partly_free_.size()) &&
                        partly_free_[superblock.partly_index] == s;
    if (listed == superblock.free.empty()) {
      return absl::InternalError(absl::StrCat("superblock ", s, " with ", superblock.free.size(),
                                              " free pages is ", listed ? "" : "not ",
                                              "listed as partly free"));
    }
    partly_free += listed;
  }
  if (used != used_ || leased != leased_ || partly_free != static_cast<int>(partly_free_.size())) {
    return absl::InternalError(absl::StrCat(
        "counted ", used, " used pages, ", leased, " superblocks, ", partly_free,
        " partly free; the pool says ", used_, ", ", leased_, ", ", partly_free_.size()));
  }
  return absl::OkStatus();
}

}  // namespace longspan
