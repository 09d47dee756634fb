#pragma once
// Blocks that run together and read each other's shared memory: clusters, on sm_90 and later.
// Elsewhere nothing of this may run.
#include <cstdint>

namespace longspan::cuda {

__device__ __forceinline__ int RankInCluster() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return static_cast<int>(rank);
}
__device__ __forceinline__ int BlocksOfCluster() {
  uint32_t blocks = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
#endif
  return static_cast<int>(blocks);
}

// All threads of all blocks: what they wrote to shared memory before is seen after.
__device__ __forceinline__ void SyncCluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What lies at `at` of this block's shared memory in that of block `rank`.
__device__ __forceinline__ float LoadOfBlock(const float* at, int rank) {
  float value = 0;
#if __CUDA_ARCH__ >= 900
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(there)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
  return value;
}

}  // namespace longspan::cuda
