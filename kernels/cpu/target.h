#pragma once
// Per-function instruction sets: every function that uses an intrinsic carries one of these, so
// that no file needs machine flags and nothing else is compiled for a machine that may not be
// there.
#define LONGSPAN_AVX2 __attribute__((target("avx2,fma,f16c")))
#define LONGSPAN_AVX512 \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define LONGSPAN_AVX512_BF16                                                \
  __attribute__((                                                           \
      target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni," \
             "avx512bf16")))

#define LONGSPAN_NEON_DOT __attribute__((target("arch=armv8.2-a+dotprod")))

// What every set but the portable one compiles plain C++ to where it has no text of its own.
#if defined(__x86_64__)
#define LONGSPAN_LANES LONGSPAN_AVX2
#else
#define LONGSPAN_LANES
#endif

#define LONGSPAN_INLINE inline __attribute__((always_inline))

// Unrolls the next loop fully: its arrays of vectors must become registers.
#if defined(__clang__)
#define LONGSPAN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LONGSPAN_UNROLL _Pragma("GCC unroll 16")
#endif
