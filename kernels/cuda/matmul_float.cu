// Few rows times float weights: kSplit warps multiply kColumns weight rows by up to kRows rows of
// x, so that each weight is read once and each element of x serves several weights. Sums are
// written as fmaf, so that they round alike for every kRows. Gated, the two weight rows are gate's
// and up's of one column of out.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"

namespace longspan::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kColumns = 2;

struct FloatArgs {
  const float* x;
  int64_t x_stride;
  const void* weights;
  int64_t weight_stride;
  float* out;
  int64_t out_stride;
  int rows, in, columns;
  const void* up;  // nullptr: not gated
  bool gelu;
};

template <class T, int kRows, bool kVector, int kSplit, bool kGated>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) DotFloats(FloatArgs a) {
  if constexpr (kGated) LetNextBegin();
  constexpr int kOuts = kGated ? 1 : kColumns;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, part = warp % kSplit;
  const int first = (blockIdx.x * (kWarpsPerBlock / kSplit) + warp / kSplit) * kOuts;
  if (first >= a.columns) return;
  const int row0 = blockIdx.y * kRows;
  const T* weight[kColumns];
  for (int c = 0; c < kColumns; ++c) {  // the last warp repeats the last column
    const void* from = kGated && c == 1 ? a.up : a.weights;
    const int column = kGated ? first : min(first + c, a.columns - 1);
    weight[c] = static_cast<const T*>(from) + column * a.weight_stride;
  }
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = a.x + int64_t{min(row0 + r, a.rows - 1)} * a.x_stride;
  float sum[kRows][kColumns] = {};

  if constexpr (kVector) {
    constexpr int kElements = 16 / sizeof(T);  // of one load
    constexpr int kAhead = 4;
    for (int n = 0; n < kAhead; ++n) {
      const int i = ((n * kSplit + part) * kWarp + lane) * kElements;
      for (int c = 0; c < kColumns && i < a.in; ++c) Prefetch(weight[c] + i);
    }
    AwaitEarlier();
#pragma unroll(kRows <= 2 ? kAhead : 1)
    for (int i = (part * kWarp + lane) * kElements; i < a.in; i += kSplit * kWarp * kElements) {
      uint4 raw[kColumns];
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        raw[c] = __ldcs(reinterpret_cast<const uint4*>(weight[c] + i));
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int quad = 0; quad < kElements / 4; ++quad) {
          const float4 v = *reinterpret_cast<const float4*>(x[r] + i + 4 * quad);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const T* w = reinterpret_cast<const T*>(&raw[c]) + 4 * quad;
            sum[r][c] = fmaf(ToFloat(w[0]), v.x, sum[r][c]);
            sum[r][c] = fmaf(ToFloat(w[1]), v.y, sum[r][c]);
            sum[r][c] = fmaf(ToFloat(w[2]), v.z, sum[r][c]);
            sum[r][c] = fmaf(ToFloat(w[3]), v.w, sum[r][c]);
          }
        }
      }
    }
  } else {
    AwaitEarlier();
    for (int i = part * kWarp + lane; i < a.in; i += kSplit * kWarp) {
      for (int c = 0; c < kColumns; ++c) {
        const float w = ToFloat(weight[c][i]);
        for (int r = 0; r < kRows; ++r) sum[r][c] = fmaf(w, x[r][i], sum[r][c]);
      }
    }
  }
  const auto StoreTotal = [&](int r, int c, float total) {
    if (row0 + r >= a.rows || first + c >= a.columns) return;
    a.out[(row0 + r) * a.out_stride + first + c] = total;
  };
  __shared__ float parts[kWarpsPerBlock][kRows][kColumns];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float totals[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      totals[c] = WarpSum(sum[r][c]);
      if (lane != 0) continue;
      if constexpr (kSplit > 1) {
        parts[warp][r][c] = totals[c];
      } else if constexpr (!kGated) {
        StoreTotal(r, c, totals[c]);
      }
    }
    if constexpr (kGated && kSplit == 1) {
      if (lane == 0) StoreTotal(r, 0, Activated(a.gelu, totals[0], totals[1]));
    }
  }
  if constexpr (kSplit > 1) {  // in order
    static_assert(kSplit == kWarpsPerBlock);
    __syncthreads();
    const auto All = [&](int r, int c) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < kSplit; ++w) all += parts[w][r][c];
      return all;
    };
    const int r = threadIdx.x / kOuts, c = threadIdx.x % kOuts;
    if (r >= kRows) return;
    StoreTotal(r, c, kGated ? Activated(a.gelu, All(r, 0), All(r, 1)) : All(r, c));
  }
}

template <class T, int kRows, bool kGated = false>
void Launch(BackendContext& context, const FloatArgs& a, bool vector) {
  constexpr int kOuts = kGated ? 1 : kColumns;  // of a warp
  const auto Run = [&](auto kernel, int split) {
    const dim3 grid(Blocks(a.columns, kWarpsPerBlock / split * kOuts), Blocks(a.rows, kRows));
    LaunchEarly(context, kernel, grid, kWarpsPerBlock * kWarp, a);
  };
  // A warp a pair of weight rows, unless these leave processors without enough loads under way.
  constexpr int kWarpsToFill = 32;
  const bool split = a.columns / kOuts < kWarpsToFill * context.sm_count;
  if (vector && split) {
    Run(DotFloats<T, kRows, true, kWarpsPerBlock, kGated>, kWarpsPerBlock);
  } else if (vector) {
    Run(DotFloats<T, kRows, true, 1, kGated>, 1);
  } else if constexpr (!kGated) {
    Run(DotFloats<T, kRows, false, 1, false>, 1);
  }
}

template <class T>
void Choose(BackendContext& context, const FloatArgs& a, bool vector) {
  if (a.up != nullptr) {
    CHECK(a.rows == 1 && vector);
    Launch<T, 1, true>(context, a, vector);
  } else if (a.rows == 1) {
    Launch<T, 1>(context, a, vector);
  } else if (a.rows == 2) {
    Launch<T, 2>(context, a, vector);
  } else if (a.rows <= 4) {
    Launch<T, 4>(context, a, vector);
  } else {
    Launch<T, 8>(context, a, vector);
  }
}

}  // namespace

bool InVectors(const Product& p) {
  const auto aligned = [](const View& v) { return reinterpret_cast<uintptr_t>(v.data) % 16 == 0; };
  const int64_t elements = 16 / BytesOf(p.weight.dtype, 1);
  return aligned(p.x) && aligned(p.weight) && aligned(p.up) && p.in() % elements == 0 &&
         p.weight.stride[0] % elements == 0 && p.x.stride[0] % 4 == 0;
}

void MultiplyFloats(BackendContext& context, const Product& p) {
  FloatArgs a;
  DescribeRows(p, &a);
  a.weights = p.weight.data;
  a.weight_stride = p.weight.stride[0];
  a.in = static_cast<int>(p.in());
  a.up = p.up.data;
  const bool vector = InVectors(p);
  switch (p.weight.dtype) {
    case DType::kF32:
      return Choose<float>(context, a, vector);
    case DType::kF16:
      return Choose<__half>(context, a, vector);
    case DType::kBF16:
      return Choose<__nv_bfloat16>(context, a, vector);
    default:
      CHECK(false) << Info(p.weight.dtype).name;
  }
}

}  // namespace longspan::cuda
