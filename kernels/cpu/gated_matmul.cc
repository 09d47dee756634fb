#include <cstring>

#include "kernels/check.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/ops_cpu.h"
#include "kernels/cpu/out_rows.h"

namespace longspan::cpu {
namespace {

LONGSPAN_INLINE void TimesSigmoid(const Lanes& x, const Lanes& of, Lanes& out) {
  Lanes e;
  Exp(-of, e);
  out = x / (e + 1.0f);
}

// activation(gate) * up of eight numbers. Gelu in the tanh form of Hendrycks and Gimpel, arXiv
// 1606.08415: 0.5 x (1 + tanh u) = x * sigmoid(2 u).
LONGSPAN_INLINE void Eight(Activation activation, const Lanes& gate, const Lanes& up, Lanes& out) {
  Lanes of = gate;
  if (activation == Activation::kGeluTanh) {
    of = (gate + gate * gate * gate * 0.044715f) * 1.59576912160573071176f;  // 2 sqrt(2 / pi)
  }
  TimesSigmoid(gate, of, out);
  out *= up;
}

LONGSPAN_INLINE void Row(Activation activation, const float* gate, const float* up, int64_t dim,
                         float* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    Eight(activation, *reinterpret_cast<const Lanes*>(gate + d),
          *reinterpret_cast<const Lanes*>(up + d), *reinterpret_cast<Lanes*>(out + d));
  }
  if (d == dim) return;
  Lanes last_gate = {}, last_up = {}, last_out;
  std::memcpy(&last_gate, gate + d, sizeof(float) * (dim - d));
  std::memcpy(&last_up, up + d, sizeof(float) * (dim - d));
  Eight(activation, last_gate, last_up, last_out);
  std::memcpy(out + d, &last_out, sizeof(float) * (dim - d));
}

LONGSPAN_LANES void RowLanes(Activation activation, const float* gate, const float* up, int64_t dim,
                             float* out) {
  Row(activation, gate, up, dim, out);
}
void RowPortable(Activation activation, const float* gate, const float* up, int64_t dim,
                 float* out) {
  Row(activation, gate, up, dim, out);
}

}  // namespace

void GatedMatMul(BackendContext& context, const GatedMatMulArgs& a) {
  const OutRows out(context, a.out);
  CHECK_EQ(a.product.out.shape[1], 2 * a.out.shape[1]);
  MatMul(context, a.product);
  const View& gate_up = a.product.out;
  const auto row_function = context.simd == Simd::kPortable ? RowPortable : RowLanes;
  const int64_t dim = a.out.shape[1];
  // Not in the product's pieces, while caches have them: gate | up of Gemma 3 270M, AMD EPYC, 2
  // threads, this loop as it is -> with its gate | up in the L1 cache: 512 rows 796 -> 699 us
  // beside the product's 5402, 0.5 % of prefill; one row 2.6 -> 2.5 us beside 60.
  context.team.For(a.out.shape[0], 1 + 8192 / dim, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t row = begin; row < end; ++row) {
      const float* gate = gate_up.as<float>() + row * gate_up.stride[0];
      out.Write(row, thread,
                [&](float* to) { row_function(a.activation, gate, gate + dim, dim, to); });
    }
  });
}

}  // namespace longspan::cpu
