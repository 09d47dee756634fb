#pragma once
// Numbers of all element types on the device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "kernels/dtype.h"
#include "kernels/view.h"

namespace longspan::cuda {

constexpr int kWarp = 32;

__device__ __forceinline__ float ToFloat(float value) { return value; }
__device__ __forceinline__ float ToFloat(__half value) { return __half2float(value); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ __forceinline__ T FromFloat(float value);
template <>
__device__ __forceinline__ float FromFloat<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

__device__ __forceinline__ float WarpSum(float value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  }
  return value;
}

// Numbers that a thread reads or writes in one access.
template <int kCount>
struct alignas(sizeof(float) * kCount) Floats {
  float at[kCount];
};

// Whether rows of all these F32 views may be read as Floats<4>; of empty ones nothing is read.
inline bool WholeFours(std::initializer_list<const View*> views) {
  for (const View* view : views) {
    if (view->empty()) continue;
    if (reinterpret_cast<uintptr_t>(view->data) % sizeof(Floats<4>) != 0) return false;
    if (view->shape[view->rank - 1] % 4 != 0) return false;
    for (int d = 0; d + 1 < view->rank; ++d) {
      if (view->stride[d] % 4 != 0) return false;
    }
  }
  return true;
}

inline int Blocks(int64_t items, int per_block) {
  return static_cast<int>((items + per_block - 1) / per_block);
}

}  // namespace longspan::cuda
