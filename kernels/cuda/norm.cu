#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kWarpsOfHeads = 4;  // heads are short: a warp each
constexpr int kLongHead = 512;    // longer ones take a block each
constexpr int kThreads = 256;

struct Layout {
  const float* x;
  float* out;
  const float* weight;
  int64_t x_row, x_group, out_row, out_group;
  int64_t count;  // rows * groups
  int groups, dim;
  float eps;
};

// x and out may be the same memory: a thread reads the elements that it writes.
template <int kWarps>
__global__ void Norm(Layout a) {
  const int warps_per_block = blockDim.x / kWarp;
  const int64_t index = kWarps == 1 ? blockIdx.x * int64_t{warps_per_block} + threadIdx.x / kWarp
                                    : int64_t{blockIdx.x};
  if (index >= a.count) return;
  const int64_t row = index / a.groups, group = index % a.groups;
  const float* x = a.x + row * a.x_row + group * a.x_group;
  float* out = a.out + row * a.out_row + group * a.out_group;
  const int first = kWarps == 1 ? threadIdx.x % kWarp : threadIdx.x;
  constexpr int kStep = kWarps * kWarp;
  float squares = 0;
  for (int d = first; d < a.dim; d += kStep) squares += x[d] * x[d];
  squares = WarpSum(squares);
  if constexpr (kWarps > 1) {
    __shared__ float parts[kWarps];
    if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = squares;
    __syncthreads();
    squares = 0;
    for (int w = 0; w < kWarps; ++w) squares += parts[w];
  }
  const float scale = 1.0f / sqrtf(squares / static_cast<float>(a.dim) + a.eps);
  for (int d = first; d < a.dim; d += kStep) out[d] = x[d] * scale * a.weight[d];
}

}  // namespace

void RmsNorm(BackendContext& context, const RmsNormArgs& a) {
  if (a.x.elements() == 0) return;
  const bool grouped = a.x.rank == 3;
  Layout layout;
  layout.x = a.x.as<float>();
  layout.out = a.out.as<float>();
  layout.weight = a.weight.as<float>();
  layout.x_row = a.x.stride[0];
  layout.out_row = a.out.stride[0];
  layout.x_group = grouped ? a.x.stride[1] : 0;
  layout.out_group = grouped ? a.out.stride[1] : 0;
  layout.groups = grouped ? static_cast<int>(a.x.shape[1]) : 1;
  layout.dim = static_cast<int>(grouped ? a.x.shape[2] : a.x.shape[1]);
  layout.count = a.x.shape[0] * layout.groups;
  layout.eps = a.eps;
  if (layout.dim <= kLongHead) {
    Norm<1>
        <<<Blocks(layout.count, kWarpsOfHeads), kWarpsOfHeads * kWarp, 0, context.stream>>>(layout);
  } else {
    Norm<kThreads / kWarp>
        <<<static_cast<unsigned>(layout.count), kThreads, 0, context.stream>>>(layout);
  }
  CheckLaunch(context, "RmsNorm");
}

}  // namespace longspan::cuda
