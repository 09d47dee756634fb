#pragma once
// All cache memory of all sequences: a PagedCache for full-attention layers and a RingCache for
// window layers over one Arena (StateCache for recurrent mixers stands beside them when the first
// such mixer comes). Layers of one kind share a page: page = page_tokens × Σ layers (K and V), a
// layer's keys followed by its values, each [kv_heads, page_tokens, head_dim]. Layers may differ in
// heads and sizes.
//
// Engine thread only, except Usage() and the closed form, which are safe from any thread.
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "engine/arena.h"
#include "engine/page_table.h"
#include "kernels/kv_view.h"
#include "models/spec.h"

namespace longspan {

struct CacheShape {
  int page_tokens = 16;
  int64_t paged_page_bytes = 0;  // one page of all full layers; 0: no such layer
  int64_t ring_page_bytes = 0;   // one page of all window layers
  int window = 0;                // W; layers with different windows use the largest ring
  int ring_slots = 0;            // ceil((W - 1) / page_tokens) + 1
};
// Heads are whole blocks of cache_dtype. Page bytes are rounded up to kPageUnitBytes. Layers that
// read another layer's cache, and recurrent ones, add nothing.
CacheShape ShapeOf(const ModelSpec& spec, DType cache_dtype, int page_tokens);

// The closed form: what a sequence of `tokens` tokens occupies.
//   pages: ceil(tokens / P) paged pages and min(ceil(tokens / P), ring_slots) ring pages.
// Sizing, admission, error text, the load RPC and the gauges all use this function.
struct CacheDemand {
  int64_t paged_pages = 0, ring_pages = 0, bytes = 0;
  CacheDemand& operator+=(const CacheDemand& other);
  CacheDemand& operator-=(const CacheDemand& other);
};
CacheDemand DemandOf(const CacheShape& shape, int64_t tokens);

// What a cache is made of: all that a decision about room needs besides DemandOf, no pages touched.
struct CacheNumbers {
  CacheShape shape;
  int64_t superblock_bytes = 0;
  int superblocks = 0;

  int64_t bytes() const { return superblock_bytes * superblocks; }
  int64_t SuperblocksFor(const CacheDemand& pages) const;
  // True if and only if a KvCache of these numbers can hold so many pages at once: it compacts, so
  // only each kind's last superblock is ever lost to rounding.
  bool Fits(const CacheDemand& pages) const { return SuperblocksFor(pages) <= superblocks; }
};
// The numbers of a KvCache that is created with `bytes`. Superblocks are 2 MiB or little more; a
// cache of less than 64 of those has smaller ones, so that rounding stays small.
CacheNumbers NumbersOf(const CacheShape& shape, int64_t bytes);
// The least `bytes`, to a superblock, for which one sequence of `tokens` tokens fits.
int64_t BytesToHold(const CacheShape& shape, int64_t tokens);

// What the cache has, as the scheduler and the gauges see it.
struct CacheUsage {
  int64_t total_bytes = 0, used_bytes = 0;  // used: pages with references × page bytes
  int64_t paged_pages_used = 0, ring_pages_used = 0;
  int64_t paged_pages_free = 0, ring_pages_free = 0;  // each if the other kind took nothing more
  int64_t paged_pages_total = 0;                      // of a cache that holds nothing else
  int superblocks_total = 0, superblocks_free = 0;
  int sequences = 0;
};

class KvCache {
 public:
  // ResourceExhausted, with the numbers, when `bytes` does not hold a page of each kind or the
  // backend has not the memory; InvalidArgument for a size that is not positive; Unimplemented for
  // a model with recurrent layers.
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(Backend& backend, const ModelSpec& spec,
                                                         DType cache_dtype, int page_tokens,
                                                         int64_t bytes, int max_sequences,
                                                         int max_context);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const CacheShape& shape() const { return numbers_.shape; }
  const CacheNumbers& numbers() const { return numbers_; }
  int64_t superblock_bytes() const { return numbers_.superblock_bytes; }
  // True when a sequence of `tokens` could ever fit, alone in the arena (superblock rounding
  // included).
  bool CouldEverFit(int64_t tokens) const;

  SequenceId Open();  // -1 when max_sequences are open
  // Room of every kind for positions [0, tokens), or none: false and nothing changes. Pages of the
  // range [committed, tokens) that are shared are replaced by private copies first, so that a step
  // may write. Call it before every step. tokens is at most max_context. Views() from before are
  // void.
  bool Reserve(SequenceId sequence, int64_t tokens);
  bool CanReserve(SequenceId sequence, int64_t tokens) const;
  // Tells that positions [0, tokens) have been written; they were reserved. Never goes back.
  void Commit(SequenceId sequence, int64_t tokens);
  int64_t committed(SequenceId sequence) const;
  // A new sequence that shares every page of `parent`'s committed tokens; -1 when none can be
  // opened. To be called between steps: no position of `parent` is written but not committed.
  SequenceId Fork(SequenceId parent);
  void Close(SequenceId sequence);  // frees everything

  // Views for a step whose sequence s is sequences[s], or no sequence's (kNoSequence): fills
  // `tables` and returns one view per layer. Valid until the next call of anything but Usage(). The
  // table arrays are in backend memory.
  const KvView* Views(const std::vector<SequenceId>& sequences);

  CacheUsage Usage() const;  // any thread; as of the last completed call
  // free + used = total per kind, reference counts add up to the tables, no page is in two lists,
  // used bytes equal the closed form when nothing is shared.
  absl::Status CheckIntegrity() const;

 private:
  friend class CacheTestPeer;

  struct Sequence {
    bool open = false;
    int64_t committed = 0;
    int64_t reserved = 0;  // positions that have room, >= committed
  };
  using PagesByKind = std::array<int64_t, 2>;  // as kinds_

  KvCache(Backend& backend, Arena arena, const CacheNumbers& numbers, const ModelSpec& spec,
          DType cache_dtype, int max_sequences, int max_context);
  void LayOut(const ModelSpec& spec, DType cache_dtype);
  bool Fits(const PagesByKind& new_pages) const;
  PagesByKind NewPages(SequenceId sequence, int64_t tokens) const;
  void MakeRoom(const PagesByKind& new_pages);
  CacheUsage CountUsage() const;
  void PublishUsage();
  absl::Status CheckReferences(const PageTable& table) const;
  absl::Status CheckSequences() const;
  absl::Status CheckClosedForm() const;

  Arena arena_;
  const CacheNumbers numbers_;
  const int max_context_;
  std::unique_ptr<PageTable> paged_, ring_;  // nullptr: the model has no such layer
  std::vector<PageTable*> kinds_;            // those that are there
  std::vector<KvView> layer_views_;
  std::vector<Sequence> sequences_;   // by SequenceId
  std::vector<SequenceId> free_ids_;  // LIFO
  mutable absl::Mutex mu_;
  CacheUsage usage_ ABSL_GUARDED_BY(mu_);
};

}  // namespace longspan
