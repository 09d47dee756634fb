#include "kernels/cpu/norm.h"

#include <cmath>

#include "kernels/cpu/context.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/ops_cpu.h"
#include "kernels/cpu/out_rows.h"

namespace longspan::cpu {
namespace {

int64_t Grain(int64_t dim) { return 1 + 16384 / dim; }  // rows

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

LONGSPAN_LANES void NormRowLanes(const float* x, const float* weight, int64_t dim, float eps,
                                 float* out) {
  NormRow(x, weight, dim, eps, out);
}
void NormRowPortable(const float* x, const float* weight, int64_t dim, float eps, float* out) {
  NormRow(x, weight, dim, eps, out);
}

}  // namespace

NormRowFunction NormRowOf(Simd simd) {
  return simd == Simd::kPortable ? NormRowPortable : NormRowLanes;
}

void RmsNorm(BackendContext& context, const RmsNormArgs& a) {
  const OutRows out(context, a.out);
  const NormRowFunction norm = NormRowOf(context.simd);
  const int64_t dim = a.x.shape[1];
  context.team.For(a.x.shape[0], Grain(dim), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = a.x.as<float>() + row * a.x.stride[0];
      out.Write(row, thread, [&](float* to) { norm(x, a.weight.as<float>(), dim, a.eps, to); });
    }
  });
}

void AddRmsNorm(BackendContext& context, const AddRmsNormArgs& a) {
  const OutRows out(context, a.out);
  const NormRowFunction norm = NormRowOf(context.simd);
  const int64_t dim = a.x.shape[1];
  context.team.For(a.x.shape[0], Grain(dim), [&](int64_t begin, int64_t end, int thread) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = a.x.as<float>() + row * a.x.stride[0];
      float* residual = a.residual.as<float>() + row * a.residual.stride[0];
      if (!a.x_weight.empty()) {
        auto* normed = reinterpret_cast<float*>(context.Scratch(thread, sizeof(float) * dim));
        norm(x, a.x_weight.as<float>(), dim, a.eps, normed);
        x = normed;
      }
      for (int64_t d = 0; d < dim; ++d) residual[d] += x[d];
      if (a.weight.empty()) continue;
      out.Write(row, thread,
                [&](float* to) { norm(residual, a.weight.as<float>(), dim, a.eps, to); });
    }
  });
}

}  // namespace longspan::cpu
