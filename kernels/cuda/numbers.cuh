#pragma once
// Numbers of all element types on the device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/check.h"
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
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Numbers {
  T at[kCount];
};
template <int kCount>
using Floats = Numbers<float, kCount>;

// __stwb: an assignment may become several stores.
template <class T, int kCount>
__device__ __forceinline__ void Store(const Floats<kCount>& from, T* to) {
  Numbers<T, kCount> numbers;
#pragma unroll
  for (int i = 0; i < kCount; ++i) numbers.at[i] = FromFloat<T>(from.at[i]);
  constexpr size_t kBytes = sizeof numbers;
  using Pair = std::conditional_t<kBytes == 4, uint32_t, uint2>;
  using Access =
      std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 16, uint4, Pair>>;
  static_assert(sizeof(Access) == kBytes);
  __stwb(reinterpret_cast<Access*>(to), *reinterpret_cast<const Access*>(&numbers));
}

// Calls `visitor` with a number of the type that an op is to write for a product.
template <class Visitor>
void VisitInput(DType type, const Visitor& visitor) {
  switch (type) {
    case DType::kF32:
      return visitor(float{});
    case DType::kBF16:
      return visitor(__nv_bfloat16{});
    default:
      CHECK(false) << Info(type).name << " is not a type of products' inputs";
  }
}

// Whether rows of all these views may be accessed as Numbers<T, 4>; empty ones never are.
inline bool WholeFours(std::initializer_list<const View*> views) {
  for (const View* view : views) {
    if (view->empty()) continue;
    if (reinterpret_cast<uintptr_t>(view->data) % BytesOf(view->dtype, 4) != 0) return false;
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
