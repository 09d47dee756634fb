// The ops of single numbers: Gather, Softcap.
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;

// What a thread (column, row) of the grid does: grid.y is the rows.
__global__ void GatherRows(const float* x, int64_t x_stride, const int32_t* rows, float* out,
                           int64_t out_stride, int64_t dim) {
  const int64_t d = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (d < dim) out[blockIdx.y * out_stride + d] = x[rows[blockIdx.y] * x_stride + d];
}

__global__ void SoftcapRows(float* x, int64_t stride, int64_t dim, float cap) {
  const int64_t d = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (d < dim) x[blockIdx.y * stride + d] = cap * tanhf(x[blockIdx.y * stride + d] / cap);
}

dim3 Grid(const View& view) {
  return dim3(Blocks(view.shape[1], kThreads), static_cast<unsigned>(view.shape[0]));
}

}  // namespace

void Gather(BackendContext& context, const GatherArgs& a) {
  CHECK(a.x.dtype == DType::kF32 && a.out.dtype == DType::kF32);
  if (a.out.elements() == 0) return;
  GatherRows<<<Grid(a.out), kThreads, 0, context.stream>>>(a.x.as<float>(), a.x.stride[0],
                                                           a.rows.as<int32_t>(), a.out.as<float>(),
                                                           a.out.stride[0], a.out.shape[1]);
  CheckLaunch(context, "Gather");
}

void Softcap(BackendContext& context, const SoftcapArgs& a) {
  if (a.x.elements() == 0) return;
  SoftcapRows<<<Grid(a.x), kThreads, 0, context.stream>>>(a.x.as<float>(), a.x.stride[0],
                                                          a.x.shape[1], a.cap);
  CheckLaunch(context, "Softcap");
}

}  // namespace longspan::cuda
