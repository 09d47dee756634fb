#pragma once
// Barriers in shared memory by which warps of different tasks hand each other the stages of a ring
// (mbarrier), and copies that arrive at them. For sm_90 and later: elsewhere they do nothing.
#include <cstdint>

namespace longspan::cuda {

// A barrier that is passed once `arrivals` have arrived, again and again; its phases' parities
// alternate, the first is 0.
__device__ __forceinline__ void InitBarrier(uint32_t barrier, int arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
#endif
}
__device__ __forceinline__ void Arrive(uint32_t barrier, int arrivals = 1) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
#endif
}
// One arrival, and `bytes` of copies that the phase waits for besides.
__device__ __forceinline__ void ArriveExpecting(uint32_t barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}
// One arrival, of those that the barrier was made for, once all copies that this thread has begun
// with cp.async are there.
__device__ __forceinline__ void ArriveBehindCopies(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}
__device__ __forceinline__ bool Passed(uint32_t barrier, int parity) {
  uint32_t passed = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
#endif
  return passed != 0;
}
__device__ __forceinline__ void AwaitPhase(uint32_t barrier, int parity) {
  while (!Passed(barrier, parity)) {
  }
}

// How the L2 cache treats what is read once: it goes before all else.
__device__ __forceinline__ uint64_t ReadOnce() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// From global to shared memory, while this thread goes on. Places and bytes are multiples of 16.
__device__ __forceinline__ void CopyBulk(uint32_t to, const void* from, int bytes, uint32_t barrier,
                                         uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
#endif
}

}  // namespace longspan::cuda
