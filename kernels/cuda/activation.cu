#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;

// Gelu in the tanh form of Hendrycks and Gimpel, arXiv 1606.08415: 0.5 x (1 + tanh u) = x *
// sigmoid(2 u).
__global__ void Activate(const float* gate_up, int64_t stride, float* out, int64_t out_stride,
                         int64_t dim, bool gelu) {
  const int64_t d = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (d >= dim) return;
  const float gate = gate_up[blockIdx.y * stride + d];
  const float up = gate_up[blockIdx.y * stride + dim + d];
  float of = gate;
  if (gelu) of = (gate + gate * gate * gate * 0.044715f) * 1.59576912160573071176f;
  out[blockIdx.y * out_stride + d] = gate / (1.0f + expf(-of)) * up;
}

}  // namespace

void GatedActivation(BackendContext& context, const GatedActivationArgs& a) {
  if (a.out.elements() == 0) return;
  const dim3 grid(Blocks(a.out.shape[1], kThreads), static_cast<unsigned>(a.out.shape[0]));
  Activate<<<grid, kThreads, 0, context.stream>>>(
      a.gate_up.as<float>(), a.gate_up.stride[0], a.out.as<float>(), a.out.stride[0],
      a.out.shape[1], a.activation == Activation::kGeluTanh);
  CheckLaunch(context, "GatedActivation");
}

}  // namespace longspan::cuda
