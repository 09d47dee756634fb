// Few rows times float weights: kSplit warps multiply kColumns weight rows by up to kRows rows of
// x, so that each weight is read once and each element of x serves several weights. Sums are
// written as fmaf, so that they round alike for every kRows.
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
};

template <class T, int kRows, bool kVector, int kSplit>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarp) DotFloats(FloatArgs a) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, part = warp % kSplit;
  const int first = (blockIdx.x * (kWarpsPerBlock / kSplit) + warp / kSplit) * kColumns;
  if (first >= a.columns) return;
  const int row0 = blockIdx.y * kRows;
  const T* weight[kColumns];
  for (int c = 0; c < kColumns; ++c) {  // the last warp repeats the last column
    weight[c] = static_cast<const T*>(a.weights) + min(first + c, a.columns - 1) * a.weight_stride;
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
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float total = WarpSum(sum[r][c]);
      if (lane != 0) continue;
      if constexpr (kSplit == 1) {
        StoreTotal(r, c, total);
      } else {
        parts[warp][r][c] = total;
      }
    }
  }
  if constexpr (kSplit > 1) {  // in order
    static_assert(kSplit == kWarpsPerBlock);
    __syncthreads();
    const int r = threadIdx.x / kColumns, c = threadIdx.x % kColumns;
    if (r >= kRows) return;
    float all = 0;
#pragma unroll
    for (int w = 0; w < kSplit; ++w) all += parts[w][r][c];
    StoreTotal(r, c, all);
  }
}

template <class T, int kRows>
void Launch(BackendContext& context, const FloatArgs& a, bool vector) {
  const auto Run = [&](auto kernel, int split) {
    const dim3 grid(Blocks(a.columns, kWarpsPerBlock / split * kColumns), Blocks(a.rows, kRows));
    LaunchEarly(context, kernel, grid, kWarpsPerBlock * kWarp, a);
  };
  // A warp a pair of columns, unless these leave processors without enough loads under way.
  constexpr int kWarpsToFill = 32;
  const bool split = a.columns / kColumns < kWarpsToFill * context.sm_count;
  if (vector && split) {
    Run(DotFloats<T, kRows, true, kWarpsPerBlock>, kWarpsPerBlock);
  } else if (vector) {
    Run(DotFloats<T, kRows, true, 1>, 1);
  } else {
    Run(DotFloats<T, kRows, false, 1>, 1);
  }
}

template <class T>
void Choose(BackendContext& context, const FloatArgs& a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  constexpr int kElements = 16 / sizeof(T);
  const bool vector = aligned(a.x) && aligned(a.weights) && a.in % kElements == 0 &&
                      a.weight_stride % kElements == 0 && a.x_stride % 4 == 0;
  if (a.rows == 1) {
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

void MultiplyFloats(BackendContext& context, const Product& p) {
  FloatArgs a;
  a.x = p.x.as<float>();
  a.x_stride = p.x.stride[0];
  a.weights = p.weight.data;
  a.weight_stride = p.weight.stride[0];
  a.out = p.out.as<float>();
  a.out_stride = p.out.stride[0];
  a.rows = static_cast<int>(p.rows());
  a.in = static_cast<int>(p.in());
  a.columns = static_cast<int>(p.columns());
  switch (p.weight.dtype) {
    case DType::kF32:
      return Choose<float>(context, a);
    case DType::kF16:
      return Choose<__half>(context, a);
    case DType::kBF16:
      return Choose<__nv_bfloat16>(context, a);
    default:
      CHECK(false) << Info(p.weight.dtype).name;
  }
}

}  // namespace longspan::cuda
