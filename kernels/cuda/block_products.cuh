#pragma once
// Block weights times rows of x that became int8 in groups of 32 elements, in a warp.
#include <cstdint>

#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {

// Compared as bits, so that a NaN or an infinity is a group's largest and reaches its scale.
__device__ __forceinline__ unsigned Magnitude(float value) { return __float_as_uint(fabsf(value)); }

// Of a group of x, from its largest Magnitude().
struct ScaleOfX {
  float value, inverse;

  __device__ __forceinline__ explicit ScaleOfX(unsigned magnitude) {
    const float largest = __uint_as_float(magnitude);
    const bool zero = largest < 1e-30f;  // 127 / largest must be finite
    value = zero ? 0.0f : largest / 127.0f;
    inverse = zero ? 0.0f : 127.0f / largest;
  }
  __device__ __forceinline__ int Level(float x) const { return __float2int_rn(x * inverse); }
};

// The bytes of a group that word 0 and word 1 of a lane's share meet.
template <class B>
__device__ __forceinline__ int2 PartOfGroup(const int8_t* group, int part) {
  if constexpr (B::kAdjacent) return *reinterpret_cast<const int2*>(group + WordAt<B>(part, 0));
  return make_int2(*reinterpret_cast<const int*>(group + WordAt<B>(part, 0)),
                   *reinterpret_cast<const int*>(group + WordAt<B>(part, 1)));
}

}  // namespace longspan::cuda
