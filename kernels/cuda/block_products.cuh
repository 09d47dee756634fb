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

// Adds to a warp's sums, as of Multiply(), group g of a unit of 16 rows of weights times that group
// of 8 rows of x. `bytes`: this lane's part of the group in x's row lane / 4; `two`: its scale and
// the sum of its int8 in rows lane % 4 * 2 and the next.
template <class B>
__device__ __forceinline__ void AddGroup(const typename B::Unit* rows, int g, int2 bytes,
                                         const float4& two, float (&sum)[4]) {
  constexpr int kScales = B::Unit::kScales;
  int dot[kScales][4] = {};
  if constexpr (kScales == 1) {
    MultiplyBytes(
        dot[0],
        {rows[0].words[g][0], rows[1].words[g][0], rows[0].words[g][1], rows[1].words[g][1]},
        bytes.x, bytes.y);
  } else {
    MultiplyBytes(dot[0], {rows[0].words[g][0], rows[1].words[g][0]}, bytes.x);
    MultiplyBytes(dot[1], {rows[0].words[g][1], rows[1].words[g][1]}, bytes.y);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const typename B::Unit& row = rows[i / 2];
#pragma unroll
    for (int half = 0; half < kScales; ++half) {
      float value = row.scale[g][half] * static_cast<float>(dot[half][i]);
      if constexpr (B::kMin) value = fmaf(-row.min[g], i % 2 == 0 ? two.y : two.w, value);
      sum[i] = fmaf(i % 2 == 0 ? two.x : two.z, value, sum[i]);
    }
  }
}

}  // namespace longspan::cuda
