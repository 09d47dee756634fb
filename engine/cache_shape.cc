// The closed form of engine/kv_cache.h: arithmetic only.
#include <algorithm>
#include <variant>

#include "engine/kv_cache.h"
#include "engine/ring_cache.h"
#include "kernels/check.h"

namespace longspan {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

CacheShape ShapeOf(const ModelSpec& spec, DType cache_dtype, int page_tokens) {
  CacheShape shape;
  shape.page_tokens = page_tokens;
  for (const LayerSpec& layer : spec.layers) {
    const auto* attention = std::get_if<AttentionSpec>(&layer.mixer);
    if (attention == nullptr || layer.cache_of.has_value()) continue;
    CHECK_EQ(attention->head_dim % Info(cache_dtype).block_elements, 0);
    const int64_t bytes =
        2 * BytesOf(cache_dtype, int64_t{attention->kv_heads} * page_tokens * attention->head_dim);
    (attention->window ? shape.ring_page_bytes : shape.paged_page_bytes) += bytes;
    shape.window = std::max(shape.window, attention->window.value_or(0));
  }
  shape.paged_page_bytes = CeilDiv(shape.paged_page_bytes, kPageUnitBytes) * kPageUnitBytes;
  shape.ring_page_bytes = CeilDiv(shape.ring_page_bytes, kPageUnitBytes) * kPageUnitBytes;
  if (shape.window > 0) shape.ring_slots = RingCache::SlotsOf(shape.window, page_tokens);
  return shape;
}

CacheDemand& CacheDemand::operator+=(const CacheDemand& other) {
  paged_pages += other.paged_pages;
  ring_pages += other.ring_pages;
  bytes += other.bytes;
  return *this;
}

CacheDemand& CacheDemand::operator-=(const CacheDemand& other) {
  paged_pages -= other.paged_pages;
  ring_pages -= other.ring_pages;
  bytes -= other.bytes;
  return *this;
}

CacheDemand DemandOf(const CacheShape& shape, int64_t tokens) {
  const int64_t pages = CeilDiv(tokens, shape.page_tokens);
  CacheDemand demand;
  if (shape.paged_page_bytes > 0) demand.paged_pages = pages;
  if (shape.ring_page_bytes > 0) demand.ring_pages = std::min<int64_t>(pages, shape.ring_slots);
  demand.bytes =
      demand.paged_pages * shape.paged_page_bytes + demand.ring_pages * shape.ring_page_bytes;
  return demand;
}

int64_t CacheNumbers::SuperblocksFor(const CacheDemand& pages) const {
  const auto superblocks = [this](int64_t pages, int64_t page_bytes) {
    return page_bytes == 0 ? 0 : CeilDiv(pages, superblock_bytes / page_bytes);
  };
  return superblocks(pages.paged_pages, shape.paged_page_bytes) +
         superblocks(pages.ring_pages, shape.ring_page_bytes);
}

CacheNumbers NumbersOf(const CacheShape& shape, int64_t bytes) {
  CacheNumbers numbers;
  numbers.shape = shape;
  numbers.superblock_bytes = Arena::SuperblockBytes({shape.paged_page_bytes, shape.ring_page_bytes},
                                                    std::min(Arena::kSuperblockFloor, bytes / 64));
  numbers.superblocks = static_cast<int>(bytes / numbers.superblock_bytes);
  return numbers;
}

int64_t BytesToHold(const CacheShape& shape, int64_t tokens) {
  const CacheDemand demand = DemandOf(shape, tokens);
  int64_t bytes = demand.bytes;
  for (;;) {
    const CacheNumbers numbers = NumbersOf(shape, bytes);
    if (numbers.Fits(demand)) return bytes;
    bytes = (numbers.superblocks + 1) * numbers.superblock_bytes;
  }
}

}  // namespace longspan
