#include <cmath>

#include "kernels/cpu/context.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/ops_cpu.h"

namespace longspan::cpu {
namespace {

LONGSPAN_INLINE void NormRow(const float* x, const float* weight, int64_t dim, float eps,
                             float* out) {
  float lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    for (int i = 0; i < kLanes; ++i) lanes[i] += x[d + i] * x[d + i];
  }
  for (; d < dim; ++d) lanes[d % kLanes] += x[d] * x[d];
  const float squares = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
                        ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
  const float scale = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
  for (d = 0; d < dim; ++d) out[d] = x[d] * scale * weight[d];
}

LONGSPAN_AVX2 void NormRowAvx2(const float* x, const float* weight, int64_t dim, float eps,
                               float* out) {
  NormRow(x, weight, dim, eps, out);
}
void NormRowPortable(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  NormRow(x, weight, dim, eps, out);
}

}  // namespace

void RmsNorm(BackendContext& context, const RmsNormArgs& a) {
  const auto norm = context.simd == Simd::kPortable ? NormRowPortable : NormRowAvx2;
  const bool grouped = a.x.rank == 3;
  const int64_t groups = grouped ? a.x.shape[1] : 1;
  const int64_t dim = grouped ? a.x.shape[2] : a.x.shape[1];
  const float* weight = a.weight.as<float>();
  const int64_t grain = 1 + 16384 / (groups * dim);
  context.team.For(a.x.shape[0], grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = row * a.x.stride[0] + (grouped ? g * a.x.stride[1] : 0);
        const int64_t to = row * a.out.stride[0] + (grouped ? g * a.out.stride[1] : 0);
        norm(a.x.as<float>() + from, weight, dim, a.eps, a.out.as<float>() + to);
      }
    }
  });
}

}  // namespace longspan::cpu
