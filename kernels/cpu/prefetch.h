#pragma once
// Asking for memory before it is read.
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/cpu/target.h"

namespace longspan::cpu {

// Asks for kBytes of memory at p and after; p may lie beyond what is mapped.
template <int kBytes>
LONGSPAN_INLINE void Prefetch(const void* p) {
  LONGSPAN_UNROLL
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// How far ahead of the levels that they read the loops over panels ask for memory. Gemma 3's
// vocabulary (Q8_0, 178 MB) and gate|up (Q5_0, 4096 x 640), AVX-512, 2 threads of an AMD EPYC (Zen
// 5), GB/s of 1 row: 46 and 48 at 4 KB, 46 and 52 at 8 KB, 48 and 52 at 12 KB, 48 and 51 at 24 KB.
inline constexpr int kAhead = 12288;

// The same for float weights, of which a tile's `bytes` begin at w: those of the next tile, or of
// one further on where the next is nearer than memory is quick. BF16 vocabulary of 8192 x 384,
// GB/s of 8 rows: 38 the next tile, 41 at 4 KB, 44 at 8 KB and at 16 KB.
inline const std::byte* FloatsAhead(const std::byte* w, int64_t bytes) {
  return w + std::max(bytes, int64_t{8192});
}

}  // namespace longspan::cpu
