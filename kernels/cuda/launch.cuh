#pragma once
// Launches that may begin while what was issued before still runs (programmatic dependent launch,
// Hopper and later; elsewhere an ordinary launch): products read weights ahead meanwhile.
#include <cuda_runtime.h>

#include <utility>

#include "kernels/cuda/check_cuda.h"

namespace longspan::cuda {

// The next kernel may begin, if it was launched for that. Called first of all by short kernels that
// stand before a product or attention, and by a product that makes the next one's x.
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

struct LaunchNeeds {
  int shared_bytes = 0;  // of a block, beyond those that its kernel declares
  int cluster = 1;       // blocks of one, side by side in grid.x
};

class LaunchConfig {
 public:
  LaunchConfig(const BackendContext& context, const LaunchNeeds& needs, dim3 grid, int threads) {
    attributes_[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes_[0].val.programmaticStreamSerializationAllowed = 1;
    attributes_[1].id = cudaLaunchAttributeClusterDimension;
    attributes_[1].val.clusterDim = {static_cast<unsigned>(needs.cluster), 1, 1};
    config_.gridDim = grid;
    config_.blockDim = dim3(threads);
    config_.dynamicSmemBytes = needs.shared_bytes;
    config_.stream = context.stream;
    config_.attrs = attributes_;
    config_.numAttrs = context.compute_capability < 90 ? 0 : needs.cluster > 1 ? 2 : 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;

  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchAttribute attributes_[2] = {};
  cudaLaunchConfig_t config_ = {};
};

template <class... Parameters, class... Arguments>
void LaunchEarlyWith(BackendContext& context, const LaunchNeeds& needs,
                     void (*kernel)(Parameters...), dim3 grid, int threads,
                     Arguments&&... arguments) {
  const LaunchConfig config(context, needs, grid, threads);
  Ok(context, cudaLaunchKernelEx(config.get(), kernel, std::forward<Arguments>(arguments)...),
     "launching a kernel");
}
template <class... Parameters, class... Arguments>
void LaunchEarly(BackendContext& context, void (*kernel)(Parameters...), dim3 grid, int threads,
                 Arguments&&... arguments) {
  LaunchEarlyWith(context, {}, kernel, grid, threads, std::forward<Arguments>(arguments)...);
}

}  // namespace longspan::cuda
