#pragma once
// KvView::Page for device code.
#include "kernels/kv_view.h"

namespace longspan::cuda {

__device__ __forceinline__ std::byte* Page(const KvView& cache, int sequence, int position) {
  const int slot = position / cache.page_tokens % cache.slots;
  const int32_t* row = cache.table + sequence * cache.table_stride;
  return cache.arena + kPageUnitBytes * static_cast<int64_t>(row[slot]);
}

}  // namespace longspan::cuda
