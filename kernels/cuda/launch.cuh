#pragma once
// Launches that may begin while what was issued before still runs (programmatic dependent launch,
// Hopper and later; elsewhere an ordinary launch): products read weights ahead meanwhile.
#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda/check_cuda.h"

namespace longspan::cuda {

// The next kernel may begin, if it was launched for that. Called first of all by short kernels that
// stand before a product.
__device__ __forceinline__ void LetNextBegin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// All that was issued before has ended, and what it wrote is seen. What LaunchEarly launches
// touches nothing before this but what no kernel writes.
__device__ __forceinline__ void AwaitEarlier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// `line` comes into the L2 cache meanwhile.
__device__ __forceinline__ void Prefetch(const void* line) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

template <class... Parameters, class... Arguments>
void LaunchEarlyWith(BackendContext& context, int shared_bytes, void (*kernel)(Parameters...),
                     dim3 grid, int threads, Arguments&&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = context.compute_capability >= 90 ? 1 : 0;
  Ok(context, cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...),
     "launching a kernel");
}
template <class... Parameters, class... Arguments>
void LaunchEarly(BackendContext& context, void (*kernel)(Parameters...), dim3 grid, int threads,
                 Arguments&&... arguments) {
  LaunchEarlyWith(context, 0, kernel, grid, threads, std::forward<Arguments>(arguments)...);
}

}  // namespace longspan::cuda
