#pragma once
// Reaches into a cache to break it, so that tests can show what CheckIntegrity() sees.
#include <vector>

#include "engine/kv_cache.h"

namespace longspan {

class CacheTestPeer {
 public:
  static PageTable& paged(KvCache& cache) { return *cache.paged_; }
  static PageTable& ring(KvCache& cache) { return *cache.ring_; }
  static Arena& arena(KvCache& cache) { return cache.arena_; }
  static PagePool& pool(PageTable& table) { return table.pool_; }
  static std::vector<int32_t>& pages(PageTable& table, SequenceId sequence) {
    return table.tables_[sequence].pages;
  }
  static int64_t& reserved(KvCache& cache, SequenceId sequence) {
    return cache.sequences_[sequence].reserved;
  }
  static bool& open(KvCache& cache, SequenceId sequence) { return cache.sequences_[sequence].open; }
  static void AddReferences(PagePool& pool, int32_t page, int count) {
    const auto at = pool.Locate(page);
    pool.superblocks_[at.superblock].references[at.page] += count;
  }
  // Puts the page on its free list though it is in use, or again though it is there.
  static void ListAsFree(PagePool& pool, int32_t page) {
    const auto at = pool.Locate(page);
    pool.superblocks_[at.superblock].free.push_back(at.page);
  }
  // Takes one page from the free list of the superblock of `page` and forgets it.
  static void LoseFreePageBeside(PagePool& pool, int32_t page) {
    pool.superblocks_[pool.Locate(page).superblock].free.pop_back();
  }
  static void ListAsFree(Arena& arena, int superblock) { arena.free_.push_back(superblock); }
  static void LoseFreeSuperblock(Arena& arena) { arena.free_.pop_back(); }
  static void SetUsed(PagePool& pool, int used) { pool.used_ = used; }
  static void SetUsedBytesGauge(KvCache& cache, int64_t bytes) {
    absl::MutexLock lock(&cache.mu_);
    cache.usage_.used_bytes = bytes;
  }
};

}  // namespace longspan
