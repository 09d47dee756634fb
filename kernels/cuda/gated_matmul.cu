// The product gate | up and its activation: at once where a form for few rows multiplies, else one
// after the other.
#include "kernels/cuda/activation.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

// A thread makes kPer numbers.
template <class From, class T, int kPer>
__global__ void Activate(const From* gate_up, int64_t stride, T* out, int64_t out_stride,
                         int64_t dim, bool gelu) {
  LetNextBegin();
  AwaitEarlier();
  const int64_t d = (blockIdx.x * int64_t{kThreads} + threadIdx.x) * kPer;
  if (d >= dim) return;
  const From* from = gate_up + blockIdx.y * stride + d;
  const auto gate = *reinterpret_cast<const Numbers<From, kPer>*>(from);
  const auto up = *reinterpret_cast<const Numbers<From, kPer>*>(from + dim);
  Floats<kPer> result;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    result.at[i] = Activated(gelu, ToFloat(gate.at[i]), ToFloat(up.at[i]));
  }
  Store(result, out + blockIdx.y * out_stride + d);
}

template <int kPer>
void Launch(BackendContext& context, const GatedMatMulArgs& a) {
  const View& gate_up = a.product.out;
  const int64_t dim = a.out.shape[1];
  const dim3 grid(Blocks(dim, kPer * kThreads), static_cast<unsigned>(a.out.shape[0]));
  VisitInput(gate_up.dtype, [&](auto in) {
    VisitInput(a.out.dtype, [&](auto out) {
      LaunchEarly(context, Activate<decltype(in), decltype(out), kPer>, grid, kThreads,
                  gate_up.as<decltype(in)>(), gate_up.stride[0], a.out.as<decltype(out)>(),
                  a.out.stride[0], dim, a.activation == Activation::kGeluTanh);
    });
  });
}

}  // namespace

void GatedMatMul(BackendContext& context, const GatedMatMulArgs& a) {
  CHECK_EQ(a.product.part_count, 2);
  CHECK_EQ(a.product.parts[0].shape[0], a.out.shape[1]);
  CHECK_EQ(a.product.parts[1].shape[0], a.out.shape[1]);
  if (a.out.elements() == 0) return;
  if (!MultiplyGated(context, a)) {
    MatMul(context, a.product);
    if (WholeFours({&a.product.out, &a.out})) {
      Launch<4>(context, a);
    } else {
      Launch<1>(context, a);
    }
  }
  CheckLaunch(context, "GatedMatMul");
}

}  // namespace longspan::cuda
