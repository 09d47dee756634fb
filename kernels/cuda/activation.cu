#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

// A thread makes kPer numbers. Gelu in the tanh form of Hendrycks and Gimpel, arXiv 1606.08415:
// 0.5 x (1 + tanh u) = x * sigmoid(2 u).
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
    const float x = ToFloat(gate.at[i]);
    const float of = gelu ? (x + x * x * x * 0.044715f) * 1.59576912160573071176f : x;
    result.at[i] = x / (1.0f + expf(-of)) * ToFloat(up.at[i]);
  }
  Store(result, out + blockIdx.y * out_stride + d);
}

template <int kPer>
void Launch(BackendContext& context, const GatedActivationArgs& a) {
  const int64_t dim = a.out.shape[1];
  const dim3 grid(Blocks(dim, kPer * kThreads), static_cast<unsigned>(a.out.shape[0]));
  VisitInput(a.gate_up.dtype, [&](auto in) {
    VisitInput(a.out.dtype, [&](auto out) {
      LaunchEarly(context, Activate<decltype(in), decltype(out), kPer>, grid, kThreads,
                  a.gate_up.as<decltype(in)>(), a.gate_up.stride[0], a.out.as<decltype(out)>(),
                  a.out.stride[0], dim, a.activation == Activation::kGeluTanh);
    });
  });
}

}  // namespace

void GatedActivation(BackendContext& context, const GatedActivationArgs& a) {
  if (a.out.elements() == 0) return;
  if (WholeFours({&a.gate_up, &a.out})) {
    Launch<4>(context, a);
  } else {
    Launch<1>(context, a);
  }
  CheckLaunch(context, "GatedActivation");
}

}  // namespace longspan::cuda
