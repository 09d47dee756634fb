#pragma once
// Hopper's asynchronous matrix products (wgmma) of bf16 with fp32 sums, and the swizzled form that
// operands lie in in shared memory. Only sm_90a has them (LONGSPAN_HAS_WGMMA); elsewhere nothing of
// this is compiled.
//
// A warpgroup (4 warps) multiplies 64 rows. Its thread t holds rows t / 32 * 16 + t % 32 / 4 and
// the 8th after, and of every 8 columns the two from t % 4 * 2: sum[4 * n + i] is column 8 * n + t
// % 4 * 2 + i % 2 of the row i / 2. An A operand in registers has the same form.
#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/phases.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LONGSPAN_HAS_WGMMA 1
#endif

namespace longspan::cuda {

// A matrix of rows in shared memory, for wgmma: columns in chunks of 64, one chunk after the other,
// each [rows, 64] with rows of 128 bytes, whose 16-byte pieces are permuted by the row's number
// (the 128-byte swizzle). Begins at a multiple of 1,024 bytes; rows are a multiple of 8.
constexpr int kSwizzledColumns = 64;
__host__ __device__ constexpr int SwizzledAt(int rows, int row, int column) {  // column % 8 == 0
  return column / 64 * rows * 128 + row * 128 + ((column % 64 / 8) ^ (row % 8)) * 16;  // bytes
}

#if defined(LONGSPAN_HAS_WGMMA)

// Descriptors of operands in swizzled shared memory (PTX ISA, "Matrix Descriptor Format"). Bits 0
// to 13 are the address, 16 to 29 the leading and 32 to 45 the stride offset, all in 16 bytes; 1 at
// bit 62 is the 128-byte swizzle.
__device__ __forceinline__ uint64_t Descriptor(uint32_t address, int leading, int stride) {
  return uint64_t{(address & 0x3ffff) >> 4} | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}
// 16 columns of all rows, the columns being what is summed over. `address`: of row 0 in the first
// of the columns, before the swizzle.
__device__ __forceinline__ uint64_t AcrossColumns(uint32_t address) {
  return Descriptor(address, 16, 8 * 128);
}
// 16 rows of all columns, the rows being what is summed over. `rows`: of the whole matrix.
__device__ __forceinline__ uint64_t AcrossRows(uint32_t address, int rows) {
  return Descriptor(address, rows * 128, 8 * 128);
}

// Of what lies `bytes` further in the same matrix: one addition, in the word that has the address.
// Products of one chain follow each other only as fast as their descriptors are made.
__device__ __forceinline__ uint64_t Further(uint64_t descriptor, uint32_t bytes) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + (bytes >> 4);
  return (descriptor >> 32 << 32) | low;
}

// Before the first product after registers of one were touched by other instructions.
__device__ __forceinline__ void FenceProducts() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kPending` groups are not done. `sum` is what the products that are now done wrote.
template <int kPending, int kCount>
__device__ __forceinline__ void WaitProducts(float (&sum)[kCount]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

#define LONGSPAN_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LONGSPAN_SUMS_16(d, i)                                                 \
  LONGSPAN_SUMS_4(d, i), LONGSPAN_SUMS_4(d, i + 4), LONGSPAN_SUMS_4(d, i + 8), \
      LONGSPAN_SUMS_4(d, i + 12)
#define LONGSPAN_SUMS_32(d) LONGSPAN_SUMS_16(d, 0), LONGSPAN_SUMS_16(d, 16)
#define LONGSPAN_SUMS_64(d) LONGSPAN_SUMS_32(d), LONGSPAN_SUMS_16(d, 32), LONGSPAN_SUMS_16(d, 48)
#define LONGSPAN_SUMS_128(d)                                                                      \
  LONGSPAN_SUMS_64(d), LONGSPAN_SUMS_16(d, 64), LONGSPAN_SUMS_16(d, 80), LONGSPAN_SUMS_16(d, 96), \
      LONGSPAN_SUMS_16(d, 112)
#define LONGSPAN_NAMES_32                                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LONGSPAN_NAMES_64                                                                        \
  LONGSPAN_NAMES_32                                                                              \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LONGSPAN_NAMES_128                                                                       \
  LONGSPAN_NAMES_64                                                                              \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, " \
  "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "   \
  "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, "   \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// sum[64, columns] = (or +=, where `add`) a[64, 16] · b[columns, 16]ᵀ, both AcrossColumns. `first`,
// `second`: the numbers of the operands behind `count` sums.
#define LONGSPAN_PRODUCT_SHARED(columns, count, a_name, b_name, add_name)                    \
  __device__ __forceinline__ void MultiplyShared(float(&sum)[count], uint64_t a, uint64_t b, \
                                                 bool add) {                                 \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_name                                  \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns                           \
                 "k16.f32.bf16.bf16 {" LONGSPAN_NAMES_##count "}, " a_name ", " b_name       \
                                                              ", p, 1, 1, 0, 0; }"           \
                 : LONGSPAN_SUMS_##count(sum)                                                \
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));                              \
  }
LONGSPAN_PRODUCT_SHARED(64, 32, "%32", "%33", "%34")
LONGSPAN_PRODUCT_SHARED(128, 64, "%64", "%65", "%66")

// The same with a in registers; b is AcrossRows, [16, columns], where kAcrossRows.
#define LONGSPAN_PRODUCT_REGISTERS(columns, count, a0, a1, a2, a3, b_name, add_name, rows_name)    \
  template <bool kAcrossRows>                                                                      \
  __device__ __forceinline__ void MultiplyRegisters(float(&sum)[count], const uint32_t(&a)[4],     \
                                                    uint64_t b, bool add) {                        \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, " add_name                                        \
                 ", 0; wgmma.mma_async.sync.aligned.m64n" #columns                                 \
                 "k16.f32.bf16.bf16 {" LONGSPAN_NAMES_##count                                      \
                 "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_name ", p, 1, 1, " rows_name "; }"      \
                 : LONGSPAN_SUMS_##count(sum)                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), \
                   "n"(static_cast<int>(kAcrossRows)));                                            \
  }
LONGSPAN_PRODUCT_REGISTERS(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
LONGSPAN_PRODUCT_REGISTERS(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
LONGSPAN_PRODUCT_REGISTERS(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

#undef LONGSPAN_SUMS_4
#undef LONGSPAN_SUMS_16
#undef LONGSPAN_SUMS_32
#undef LONGSPAN_SUMS_64
#undef LONGSPAN_SUMS_128
#undef LONGSPAN_NAMES_32
#undef LONGSPAN_NAMES_64
#undef LONGSPAN_NAMES_128
#undef LONGSPAN_PRODUCT_SHARED
#undef LONGSPAN_PRODUCT_REGISTERS

// What was written to shared memory by this thread becomes visible to products.
__device__ __forceinline__ void FenceForProducts() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers move from warpgroups that load to those that compute.
template <int kRegisters>
__device__ __forceinline__ void KeepRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif  // LONGSPAN_HAS_WGMMA

}  // namespace longspan::cuda
