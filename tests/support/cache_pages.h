#pragma once
// Room for one layer's keys and values of some sequences, for tests of what writes there.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/kv_view.h"

namespace longspan::testing {

// Each sequence has pages of its own, scattered over the arena: rings (window > 0), or tables for
// `tokens` positions, in which every few entries share a page.
struct CachePages {
  static constexpr int kPageTokens = 16;
  static constexpr int kPagesEach = 5;

  CachePages(int sequences, DType dtype, int kv_heads, int dim, int window, int tokens) {
    const int positions = window > 0 ? window - 1 + kPageTokens : tokens;
    const int slots = (positions + kPageTokens - 1) / kPageTokens;
    const int each = window > 0 ? slots : std::min(slots, kPagesEach);
    const int64_t kv_bytes = BytesOf(dtype, int64_t{kv_heads} * kPageTokens * dim);
    const int64_t units = (2 * kv_bytes + kPageUnitBytes - 1) / kPageUnitBytes;
    arena.assign(units * kPageUnitBytes * sequences * each, 0xff);
    for (int s = 0; s < sequences; ++s) {
      for (int slot = 0; slot < slots; ++slot) {
        table.push_back(static_cast<int32_t>((sequences * (slot % each + 1) - 1 - s) * units));
      }
    }
    view.value_offset = kv_bytes;
    view.dtype = dtype;
    view.page_tokens = kPageTokens;
    view.kv_heads = kv_heads;
    view.head_dim = dim;
    view.table_stride = view.slots = slots;
  }

  // The view of them where `there` brings vectors.
  template <class Travel>
  KvView At(Travel& there) {
    KvView cache = view;
    cache.arena = reinterpret_cast<std::byte*>(there(arena));
    cache.table = there(table);
    return cache;
  }

  std::vector<uint8_t> arena;
  std::vector<int32_t> table;
  KvView view;  // without memory
};

}  // namespace longspan::testing
