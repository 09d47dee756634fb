// Few rows times block weights, straight from the blocks: kParts lanes share a block, a warp
// multiplies one weight row by up to kRows rows of x with byte dot products. Sums are written as
// fmaf, so that they round alike for every kRows.
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kGroup = 32;                     // elements of x that share a scale
constexpr float kSmallestActivation = 1e-30f;  // below: 127 / largest is not finite

// A warp for each group of 32.
__global__ void Quantise(const float* x, int64_t stride, int in, int64_t groups,
                         QuantisedRows out) {
  const int64_t group = blockIdx.x * int64_t{kWarpsPerBlock} + threadIdx.x / kWarp;
  if (group >= groups) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t per_row = in / kGroup;
  const float value = x[group / per_row * stride + group % per_row * kGroup + lane];
  // Compared as bits, so that a NaN or an infinity is the largest and reaches the scale.
  const unsigned magnitude = __reduce_max_sync(0xffffffffu, __float_as_uint(fabsf(value)));
  const float largest = __uint_as_float(magnitude);
  const bool zero = largest < kSmallestActivation;
  const float scaled = zero ? 0.0f : value * (127.0f / largest);
  out.q[group * kGroup + lane] = static_cast<int8_t>(__float2int_rn(scaled));
  if (lane == 0) out.scale[group] = zero ? 0.0f : largest / 127.0f;
}

struct BlockArgs {
  const uint8_t* weights;
  int64_t weight_bytes;  // of a row
  QuantisedRows x;
  float* out;
  int64_t out_stride;
  int rows, in, columns;
};

template <class B, int kRows>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) DotBlocks(BlockArgs a) {
  const int lane = threadIdx.x % kWarp;
  const int column = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarp;
  if (column >= a.columns) return;
  const int row0 = blockIdx.y * kRows;
  const uint8_t* weights = a.weights + column * a.weight_bytes;
  const int part = lane % B::kParts;
  const int blocks = a.in / B::kElements;
  constexpr int kBlocksAtOnce = kWarp / B::kParts;
  constexpr int kRun = B::kWords / B::kScales;
  float sum[kRows] = {};

#pragma unroll 2
  for (int b = lane / B::kParts; b < blocks; b += kBlocksAtOnce) {
    int words[B::kWords];
    float scale[B::kScales], min[B::kScales];
    B::Load(weights + int64_t{b} * B::kBytes, part, words, scale, min);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = ::min(row0 + r, a.rows - 1);
      const int8_t* q = a.x.q + row * a.in + b * B::kElements;
      const float* x_scale = a.x.scale + (row * a.in + b * B::kElements) / kGroup;
#pragma unroll
      for (int s = 0; s < B::kScales; ++s) {
        int dot = 0, total = 0;
#pragma unroll
        for (int w = s * kRun; w < (s + 1) * kRun; ++w) {
          const int x = *reinterpret_cast<const int*>(q + B::At(part, w));
          dot = __dp4a(words[w], x, dot);
          if constexpr (B::kMin) total = __dp4a(0x01010101, x, total);
        }
        float value = scale[s] * static_cast<float>(dot);
        if constexpr (B::kMin) value = fmaf(-min[s], static_cast<float>(total), value);
        sum[r] = fmaf(x_scale[B::At(part, s * kRun) / kGroup], value, sum[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float total = WarpSum(sum[r]);
    if (lane == 0 && row0 + r < a.rows) a.out[(row0 + r) * a.out_stride + column] = total;
  }
}

template <class B, int kRows>
void Launch(BackendContext& context, const BlockArgs& a) {
  const dim3 grid(Blocks(a.columns, kWarpsPerBlock), Blocks(a.rows, kRows));
  DotBlocks<B, kRows><<<grid, kWarpsPerBlock * kWarp, 0, context.stream>>>(a);
}

}  // namespace

void QuantiseRows(BackendContext& context, const View& x, const QuantisedRows& rows) {
  CHECK_EQ(x.shape[1] % kGroup, 0);
  const int64_t groups = x.shape[0] * (x.shape[1] / kGroup);
  Quantise<<<Blocks(groups, kWarpsPerBlock), kWarpsPerBlock * kWarp, 0, context.stream>>>(
      x.as<float>(), x.stride[0], static_cast<int>(x.shape[1]), groups, rows);
}

void MultiplyBlocks(BackendContext& context, const Product& p, const QuantisedRows& rows) {
  BlockArgs a;
  a.weights = p.weight.as<const uint8_t>();
  a.weight_bytes = BytesOf(p.weight.dtype, p.in());
  a.x = rows;
  a.out = p.out.as<float>();
  a.out_stride = p.out.stride[0];
  a.rows = static_cast<int>(p.rows());
  a.in = static_cast<int>(p.in());
  a.columns = static_cast<int>(p.columns());
  CHECK(VisitBlocks(p.weight.dtype, [&](auto format) {
    using B = decltype(format);
    if (a.rows == 1) {
      Launch<B, 1>(context, a);
    } else if (a.rows <= 2) {
      Launch<B, 2>(context, a);
    } else if (a.rows <= 4) {
      Launch<B, 4>(context, a);
    } else {
      Launch<B, 8>(context, a);
    }
  })) << Info(p.weight.dtype).name;
}

}  // namespace longspan::cuda
