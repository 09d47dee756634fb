#pragma once
// How one layer's cached keys and values lie in the cache arena. std only: nvcc compiles this.
//
// Paged and ring caches are one form: position p of sequence s is in the page
//   table[s][(p / page_tokens) % slots], row p % page_tokens.
// A paged table is wide enough never to wrap; a ring's wraps at slots = ceil((W - 1) / page_tokens)
// + 1. A table entry counts kPageUnitBytes from `arena`. Inside a page this layer's keys start at
// key_offset and its values at value_offset, each [kv_heads, page_tokens, head_dim], contiguous; a
// head's numbers are whole blocks of the dtype.
#include <cstddef>
#include <cstdint>

#include "kernels/dtype.h"

namespace longspan {

inline constexpr int64_t kPageUnitBytes = 256;

struct KvView {
  std::byte* arena = nullptr;
  int64_t key_offset = 0;    // bytes
  int64_t value_offset = 0;  // bytes
  DType dtype = DType::kBF16;
  int page_tokens = 0;
  int kv_heads = 0;
  int head_dim = 0;
  const int32_t* table = nullptr;  // [sequences, slots], row stride table_stride
  int64_t table_stride = 0;
  int slots = 0;

  std::byte* Page(int sequence, int64_t position) const {
    const int64_t slot = (position / page_tokens) % slots;
    return arena + kPageUnitBytes * static_cast<int64_t>(table[sequence * table_stride + slot]);
  }
};

}  // namespace longspan
