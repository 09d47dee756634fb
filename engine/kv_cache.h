#pragma once
// All cache memory of all sequences: a PagedCache for full-attention layers and a RingCache for window
// layers over one Arena (StateCache for recurrent mixers stands beside them when the first such mixer
// comes). Layers of one kind share a page: page = page_tokens × Σ layers (K and V).
//
// Engine thread only, except Usage() and the closed form, which are safe from any thread.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "engine/arena.h"
#include "kernels/kv_view.h"
#include "models/spec.h"

namespace longspan {

struct CacheShape {
  int page_tokens = 16;
  int64_t paged_page_bytes = 0;   // one page of all full layers; 0: no such layer
  int64_t ring_page_bytes = 0;    // one page of all window layers
  int window = 0;                 // W; layers with different windows use the largest ring
  int ring_slots = 0;             // ceil((W - 1) / page_tokens) + 1
};
CacheShape ShapeOf(const ModelSpec& spec, DType cache_dtype, int page_tokens);

// The closed form: what a sequence of `tokens` tokens occupies.
//   pages: ceil(tokens / P) paged pages and min(ceil(tokens / P), ring_slots) ring pages.
// Sizing, admission, error text, the load RPC and the gauges all use this function.
struct CacheDemand {
  int64_t paged_pages = 0, ring_pages = 0, bytes = 0;
};
CacheDemand DemandOf(const CacheShape& shape, int64_t tokens);

// What the cache has, as the scheduler and the gauges see it.
struct CacheUsage {
  int64_t total_bytes = 0, used_bytes = 0;            // used: pages with references × page bytes
  int64_t paged_pages_used = 0, ring_pages_used = 0;
  int64_t paged_pages_free = 0, ring_pages_free = 0;  // each if the other kind took nothing more
  int superblocks_total = 0, superblocks_free = 0;
  int sequences = 0;
};

using SequenceId = int32_t;

class KvCache {
 public:
  static absl::StatusOr<std::unique_ptr<KvCache>> Create(Backend& backend, const ModelSpec& spec,
                                                         DType cache_dtype, int page_tokens,
                                                         int64_t bytes, int max_sequences,
                                                         int max_context);

  const CacheShape& shape() const { return shape_; }
  int64_t superblock_bytes() const { return arena_.superblock_bytes(); }
  // True when a sequence of `tokens` could ever fit, alone in the arena (superblock rounding included).
  bool CouldEverFit(int64_t tokens) const;

  SequenceId Open();                                 // -1 when max_sequences are open
  // Room of every kind for positions [0, tokens), or none: false and nothing changes. Pages of the range
  // [committed, tokens) that are shared are replaced by private copies first, so that a step may write.
  bool Reserve(SequenceId sequence, int64_t tokens);
  bool CanReserve(SequenceId sequence, int64_t tokens) const;
  // Tells that positions [0, tokens) have been written.
  void Commit(SequenceId sequence, int64_t tokens);
  int64_t committed(SequenceId sequence) const;
  // A new sequence that shares every page of `parent`'s committed tokens; -1 when none can be opened.
  SequenceId Fork(SequenceId parent);
  void Close(SequenceId sequence);                   // frees everything

  // Views for a step whose sequence s is sequences[s]: fills `tables` and returns one view per layer.
  // Valid until the next call. The table arrays are in backend memory.
  const KvView* Views(const std::vector<SequenceId>& sequences);

  CacheUsage Usage() const;                          // any thread
  // free + used = total per kind, reference counts add up to the tables, no page is in two lists, used
  // bytes equal the closed form when nothing is shared.
  absl::Status CheckIntegrity() const;

  ~KvCache();

 private:
  struct Sequence;
  KvCache(Backend& backend, Arena arena, CacheShape shape);
  void PublishUsage();

  Backend& backend_;
  Arena arena_;
  CacheShape shape_;
  std::unique_ptr<PagePool> paged_, ring_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::vector<KvView> layer_views_;
  Buffer paged_table_, ring_table_;
  mutable absl::Mutex mu_;
  CacheUsage usage_ ABSL_GUARDED_BY(mu_);
};

}  // namespace longspan
