#pragma once
// The instructions that bring tiles into shared memory and multiply them there, as a warp issues
// them. T is __nv_bfloat16 or __half; a row of 16 bytes is 8 of them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace longspan::cuda {

using Bf16 = __nv_bfloat16;

__device__ __forceinline__ uint32_t Shared(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// x and y, rounded, as a pair of bf16: x in the lower half.
__device__ __forceinline__ uint32_t PackBf16(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// x and y as a pair of bf16 and the pair of what that leaves of them: 16 bits of each.
__device__ __forceinline__ void SplitBf16(float x, float y, uint32_t* high, uint32_t* low) {
  const auto Pack = [](__nv_bfloat16 first, __nv_bfloat16 second) {
    return static_cast<uint32_t>(__bfloat16_as_ushort(first)) |
           static_cast<uint32_t>(__bfloat16_as_ushort(second)) << 16;
  };
  const __nv_bfloat16 hx = __float2bfloat16_rn(x), hy = __float2bfloat16_rn(y);
  *high = Pack(hx, hy);
  *low = Pack(__float2bfloat16_rn(x - __bfloat162float(hx)),
              __float2bfloat16_rn(y - __bfloat162float(hy)));
}

template <class T>
__device__ __forceinline__ T LoadShared(uint32_t from) {
  return *static_cast<const T*>(__cvta_shared_to_generic(from));
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void LoadMatrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
__device__ __forceinline__ void LoadTransposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}
template <class T>
__device__ __forceinline__ void LoadMatrices(uint32_t (&to)[4], const T* row) {
  LoadMatrices(to, Shared(row));
}
template <class T>
__device__ __forceinline__ void LoadTransposed(uint32_t (&to)[4], const T* row) {
  LoadTransposed(to, Shared(row));
}

// sum[16, 8] += a[16, 16] · b[16, 8]. Lane l has of sum rows l / 4 (elements 0, 1) and l / 4 + 8,
// columns l % 4 * 2 and the next.
template <class T>
__device__ __forceinline__ void Multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// The same of signed bytes: a[16, 32], b[32, 8]; each word has four that follow each other.
__device__ __forceinline__ void MultiplyBytes(int (&sum)[4], const int (&a)[4], int b0, int b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// a[16, 16], b[16, 8].
__device__ __forceinline__ void MultiplyBytes(int (&sum)[4], const int (&a)[2], int b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

// 16 bytes from global to shared memory, or zeros.
__device__ __forceinline__ void CopyAsync(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0));
}
template <class T>
__device__ __forceinline__ void CopyAsync(T* to, const T* from, bool valid) {
  CopyAsync(Shared(to), from, valid);
}
__device__ __forceinline__ void Commit() { asm volatile("cp.async.commit_group;"); }
// Until all but the last kPending groups of this thread's copies are there.
template <int kPending>
__device__ __forceinline__ void Await() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}
// Until all are.
__device__ __forceinline__ void AwaitCopies() { asm volatile("cp.async.wait_all;"); }

}  // namespace longspan::cuda
