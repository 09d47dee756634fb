// Activations to the cache's element type.
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;

struct Strides {
  int64_t outer, middle;
};

template <class To>
__global__ void ConvertRows(const float* x, Strides from, To* out, Strides to, int64_t middle,
                            int64_t dim) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= middle * dim) return;
  const int64_t m = i / dim, d = i % dim, row = blockIdx.y;
  out[row * to.outer + m * to.middle + d] =
      FromFloat<To>(x[row * from.outer + m * from.middle + d]);
}

// Any view as [outer, middle, dim].
void Spread(const View& view, int64_t shape[3], Strides* strides) {
  const int r = view.rank;
  shape[2] = view.shape[r - 1];
  shape[1] = r == 3 ? view.shape[1] : 1;
  shape[0] = r >= 2 ? view.shape[0] : 1;
  strides->middle = r == 3 ? view.stride[1] : 0;
  strides->outer = r >= 2 ? view.stride[0] : 0;
}

template <class To>
void Launch(BackendContext& context, const ConvertArgs& a) {
  int64_t shape[3];
  Strides from, to;
  Spread(a.out, shape, &to);
  Spread(a.x, shape, &from);
  const dim3 grid(Blocks(shape[1] * shape[2], kThreads), static_cast<unsigned>(shape[0]));
  ConvertRows<To><<<grid, kThreads, 0, context.stream>>>(a.x.as<float>(), from, a.out.as<To>(), to,
                                                         shape[1], shape[2]);
  CheckLaunch(context, "Convert");
}

}  // namespace

void Convert(BackendContext& context, const ConvertArgs& a) {
  CHECK(a.x.dtype == DType::kF32);
  CHECK_EQ(a.x.rank, a.out.rank);
  if (a.x.elements() == 0) return;
  switch (a.out.dtype) {
    case DType::kF32:
      return Launch<float>(context, a);
    case DType::kF16:
      return Launch<__half>(context, a);
    case DType::kBF16:
      return Launch<__nv_bfloat16>(context, a);
    default:
      CHECK(false) << Info(a.x.dtype).name << " to " << Info(a.out.dtype).name;
  }
}

}  // namespace longspan::cuda
