#pragma once
// One row's keys and values into a cache, which more than one op does.
#include <cstdint>

#include "kernels/ops.h"

namespace longspan::cpu {

// Row `row` of key and value, [rows, kv_heads, head_dim] in the cache's dtype, as `sequence`'s
// `position`.
void StoreRow(const View& key, const View& value, int64_t row, const KvView& cache, int sequence,
              int64_t position);

}  // namespace longspan::cpu
