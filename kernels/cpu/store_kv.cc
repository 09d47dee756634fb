#include "kernels/cpu/store_kv.h"

#include <algorithm>
#include <cstring>

#include "kernels/check.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/ops_cpu.h"

namespace longspan::cpu {

void StoreRow(const View& key, const View& value, int64_t row, const KvView& cache, int sequence,
              int64_t position) {
  const int64_t row_bytes = BytesOf(cache.dtype, cache.head_dim);
  std::byte* page = cache.Page(sequence, position);
  const int64_t slot = position % cache.page_tokens;
  for (int h = 0; h < cache.kv_heads; ++h) {
    const int64_t at = (static_cast<int64_t>(h) * cache.page_tokens + slot) * row_bytes;
    std::memcpy(page + cache.key_offset + at,
                key.row(row) + BytesOf(cache.dtype, h * key.stride[1]), row_bytes);
    std::memcpy(page + cache.value_offset + at,
                value.row(row) + BytesOf(cache.dtype, h * value.stride[1]), row_bytes);
  }
}

void StoreKv(BackendContext&, const StoreKvArgs& a) {
  CHECK(a.key.dtype == a.cache.dtype && a.value.dtype == a.cache.dtype);
  for (int s = 0; s < a.batch.sequences; ++s) {
    const int begin = a.batch.row_begin[s], end = a.batch.row_begin[s + 1];
    const int first = a.window > 0 ? std::max(begin, end - a.window) : begin;
    for (int row = first; row < end; ++row) {
      const int64_t position = static_cast<int64_t>(a.batch.start[s]) + row - begin;
      StoreRow(a.key, a.value, row, a.cache, s, position);
    }
  }
}

}  // namespace longspan::cpu
