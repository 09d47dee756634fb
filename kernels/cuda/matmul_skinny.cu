// Few rows times bf16 weights on the tensor cores, at the speed at which memory gives the weights.
// Weights are the products' rows and x's rows their columns, of which a product has 8.
// x goes in as two bf16 (its rounding and what that lost), which keeps 16 bits of it. Gated, the
// halves of a tile's weights are gate's and up's of the same columns of out.
#include <algorithm>

#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 8;   // of a block; each takes every kWarps-th slice of the sums
constexpr int kSlice = 32;  // elements: 8 of each of the 4 threads that share a row
constexpr int kStep = kWarps * kSlice;
constexpr int kTileColumns = 16;  // of a product
template <bool kGated>
constexpr int kTileOuts = kGated ? kTileColumns / 2 : kTileColumns;

struct SkinnyArgs {
  const float* x;
  int64_t x_stride;
  const Bf16* weights;
  int64_t weight_stride;
  float* out;
  int64_t out_stride;
  int rows, in, columns;
  const Bf16* up;  // nullptr: not gated
  bool gelu;
};

// 8 elements of a row of x, in pairs.
struct Fragment {
  uint32_t high[4], low[4];
};

__device__ __forceinline__ Fragment Halves(const float4 (&v)[2]) {
  Fragment f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float a = i % 2 == 0 ? v[i / 2].x : v[i / 2].z, b = i % 2 == 0 ? v[i / 2].y : v[i / 2].w;
    f.high[i] = PackBf16(a, b);
    f.low[i] = PackBf16(a - __uint_as_float(f.high[i] << 16),
                        b - __uint_as_float(f.high[i] & 0xffff0000u));
  }
  return f;
}

// A product's sum over 16 elements is the same in whatever order both sides have them: here each
// thread's are 8 that lie side by side, taken by two products.
template <int kTiles, bool kGated>
__global__ void __launch_bounds__(kWarps* kWarp) Skinny(const SkinnyArgs a) {
  if constexpr (kGated) LetNextBegin();
  constexpr int kAhead = kTiles == 1 ? 4 : 2;  // slices whose loads are under way
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = lane / 4, first = lane % 4 * 8;
  const int column0 = blockIdx.x * kTiles * kTileOuts<kGated>;
  const Bf16* weights[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // beyond the end the last column again
      const int of_tile = kGated ? group : half * 8 + group;
      const int column = min(column0 + m * kTileOuts<kGated> + of_tile, a.columns - 1);
      const Bf16* from = kGated && half == 1 ? a.up : a.weights;
      weights[m][half] = from + column * a.weight_stride + first;
    }
  }
  float sum[kTiles][4] = {};
  uint4 raw[2][kAhead][kTiles][2];
  const auto Load = [&](int k0, uint4(&to)[kAhead][kTiles][2]) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int k = k0 + s * kStep;
      if (k >= a.in) break;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          to[s][m][half] = __ldcs(reinterpret_cast<const uint4*>(weights[m][half] + k));
        }
      }
    }
  };
  const auto Use = [&](int k0, const uint4(&from)[kAhead][kTiles][2]) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int k = k0 + s * kStep;
      if (k >= a.in) break;
      float4 v[2] = {};
      if (group < a.rows) {
        const auto* x = reinterpret_cast<const float4*>(a.x + group * a.x_stride + k + first);
        v[0] = x[0];
        v[1] = x[1];
      }
      const Fragment f = Halves(v);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const uint4 w0 = from[s][m][0], w1 = from[s][m][1];
        Multiply<Bf16>(sum[m], {w0.x, w1.x, w0.y, w1.y}, f.high[0], f.high[1]);
        Multiply<Bf16>(sum[m], {w0.z, w1.z, w0.w, w1.w}, f.high[2], f.high[3]);
        Multiply<Bf16>(sum[m], {w0.x, w1.x, w0.y, w1.y}, f.low[0], f.low[1]);
        Multiply<Bf16>(sum[m], {w0.z, w1.z, w0.w, w1.w}, f.low[2], f.low[3]);
      }
    }
  };
  const int begin = warp * kSlice;
  Load(begin, raw[0]);
  AwaitEarlier();
  for (int k = begin; k < a.in; k += 2 * kAhead * kStep) {
    Load(k + kAhead * kStep, raw[1]);
    Use(k, raw[0]);
    Load(k + 2 * kAhead * kStep, raw[0]);
    Use(k + kAhead * kStep, raw[1]);
  }

  // The warps' sums, in order.
  constexpr int kColumns = kTiles * kTileColumns;
  __shared__ float sums[kWarps][kSkinnyRows][kColumns];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][lane % 4 * 2 + i % 2][m * kTileColumns + i / 2 * 8 + group] = sum[m][i];
    }
  }
  __syncthreads();
  const auto All = [&](int row, int column) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[w][row][column];
    return all;
  };
  constexpr int kOuts = kTiles * kTileOuts<kGated>;
  for (int i = threadIdx.x; i < a.rows * kOuts; i += kWarps * kWarp) {
    const int row = i / kOuts, column = i % kOuts;
    if (column0 + column >= a.columns) continue;
    float& to = a.out[row * a.out_stride + column0 + column];
    if constexpr (kGated) {
      const int gate = column / 8 * kTileColumns + column % 8;
      to = Activated(a.gelu, All(row, gate), All(row, gate + 8));
    } else {
      to = All(row, column);
    }
  }
}

template <bool kGated>
void Launch(BackendContext& context, const SkinnyArgs& a) {
  const auto Run = [&](auto kernel, int tiles) {
    LaunchEarly(context, kernel, dim3(Blocks(a.columns, tiles * kTileOuts<kGated>)), kWarps * kWarp,
                a);
  };
  // Two tiles a block read x half as often, where that leaves blocks enough for every processor.
  if (a.columns >= 4 * kTileOuts<kGated> * context.sm_count) {
    Run(Skinny<2, kGated>, 2);
  } else {
    Run(Skinny<1, kGated>, 1);
  }
}

}  // namespace

bool Bf16InVectors(const Product& p) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return p.weight.dtype == DType::kBF16 && aligned(p.x.data) && aligned(p.weight.data) &&
         aligned(p.up.data) && p.x.stride[0] % 4 == 0 && p.weight.stride[0] % 8 == 0;
}

bool IsSkinny(const Product& p) {
  return Bf16InVectors(p) && p.in() % kSlice == 0 && p.rows() > 1 && p.rows() <= kSkinnyRows;
}

void MultiplySkinny(BackendContext& context, const Product& p) {
  SkinnyArgs a;
  DescribeRows(p, &a);
  a.weights = p.weight.as<Bf16>();
  a.weight_stride = p.weight.stride[0];
  a.in = static_cast<int>(p.in());
  a.up = p.up.as<Bf16>();
  if (a.up != nullptr) {
    Launch<true>(context, a);
  } else {
    Launch<false>(context, a);
  }
}

}  // namespace longspan::cuda
