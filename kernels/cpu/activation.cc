#include "kernels/cpu/context.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/ops_cpu.h"

namespace longspan::cpu {
namespace {

LONGSPAN_INLINE float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

// x * sigmoid(x).
LONGSPAN_INLINE void SiluRow(const float* gate, const float* up, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = gate[d] * Sigmoid(gate[d]) * up[d];
}

// Hendrycks and Gimpel, arXiv 1606.08415, the tanh form: 0.5 x (1 + tanh u) = x * sigmoid(2 u).
LONGSPAN_INLINE void GeluRow(const float* gate, const float* up, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d) {
    const float x = gate[d];
    const float u = 0.79788456080286535588f * (x + 0.044715f * x * x * x);
    out[d] = x * Sigmoid(2 * u) * up[d];
  }
}

LONGSPAN_AVX2 void RowAvx2(Activation activation, const float* gate, const float* up, int64_t dim,
                           float* out) {
  activation == Activation::kSilu ? SiluRow(gate, up, dim, out) : GeluRow(gate, up, dim, out);
}
void RowPortable(Activation activation, const float* gate, const float* up, int64_t dim,
                 float* out) {
  activation == Activation::kSilu ? SiluRow(gate, up, dim, out) : GeluRow(gate, up, dim, out);
}

}  // namespace

void GatedActivation(BackendContext& context, const GatedActivationArgs& a) {
  const auto row_function = context.simd == Simd::kPortable ? RowPortable : RowAvx2;
  const int64_t dim = a.out.shape[1];
  context.team.For(a.out.shape[0], 1 + 8192 / dim, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = a.gate_up.as<float>() + row * a.gate_up.stride[0];
      row_function(a.activation, gate, gate + dim, dim, a.out.as<float>() + row * a.out.stride[0]);
    }
  });
}

}  // namespace longspan::cpu
