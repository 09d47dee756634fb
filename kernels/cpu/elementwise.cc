// The ops of single numbers: Gather, Softcap.
#include <cmath>
#include <cstring>

#include "kernels/cpu/context.h"
#include "kernels/cpu/ops_cpu.h"

namespace longspan::cpu {

void Gather(BackendContext&, const GatherArgs& a) {
  const int32_t* rows = a.rows.as<int32_t>();
  const size_t bytes = BytesOf(a.x.dtype, a.x.shape[1]);
  for (int64_t i = 0; i < a.out.shape[0]; ++i) std::memcpy(a.out.row(i), a.x.row(rows[i]), bytes);
}

void Softcap(BackendContext& context, const SoftcapArgs& a) {
  context.team.For(a.x.shape[0], 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      float* x = a.x.as<float>() + row * a.x.stride[0];
      for (int64_t d = 0; d < a.x.shape[1]; ++d) x[d] = a.cap * std::tanh(x[d] / a.cap);
    }
  });
}

}  // namespace longspan::cpu
