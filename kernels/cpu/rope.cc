#include <cmath>

#include "kernels/cpu/context.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/ops_cpu.h"

namespace longspan::cpu {
namespace {

// cos and sin of position * frequency. The product is rounded to float, as the reference models do
// it; the angle is then reduced by pi/2 in double, so that large positions keep their accuracy.
LONGSPAN_INLINE void Angles(float position, const float* frequencies, int64_t count,
                            float magnitude, float* cosines, float* sines) {
  for (int64_t i = 0; i < count; ++i) {
    const float product = position * frequencies[i];
    const double angle = product;
    const double turns = angle * 0.63661977236758134308;  // 2 / pi
    const auto quadrant = static_cast<int32_t>(turns + (turns < 0 ? -0.5 : 0.5));
    const double n = quadrant;
    const double r = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11;
    const double r2 = r * r;
    // Taylor series on [-pi/4, pi/4], below 1e-12.
    const double sine =
        r * (1 + r2 * (-1.0 / 6 +
                       r2 * (1.0 / 120 +
                             r2 * (-1.0 / 5040 + r2 * (1.0 / 362880 + r2 * (-1.0 / 39916800))))));
    const double cosine =
        1 + r2 * (-1.0 / 2 +
                  r2 * (1.0 / 24 +
                        r2 * (-1.0 / 720 + r2 * (1.0 / 40320 +
                                                 r2 * (-1.0 / 3628800 + r2 * (1.0 / 479001600))))));
    const bool swap = (quadrant & 1) != 0;
    const double c = swap ? sine : cosine;
    const double s = swap ? cosine : sine;
    cosines[i] = static_cast<float>(((quadrant + 1) & 2) != 0 ? -c : c) * magnitude;
    sines[i] = static_cast<float>((quadrant & 2) != 0 ? -s : s) * magnitude;
  }
}

LONGSPAN_INLINE void RotateHalves(float* x, const float* cosines, const float* sines,
                                  int64_t pairs) {
  float* y = x + pairs;
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[i], b = y[i];
    x[i] = a * cosines[i] - b * sines[i];
    y[i] = b * cosines[i] + a * sines[i];
  }
}

LONGSPAN_INLINE void RotatePairs(float* x, const float* cosines, const float* sines,
                                 int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i], b = x[2 * i + 1];
    x[2 * i] = a * cosines[i] - b * sines[i];
    x[2 * i + 1] = b * cosines[i] + a * sines[i];
  }
}

LONGSPAN_INLINE void RotateRow(const RopeArgs& a, int64_t row, float* angles) {
  const int64_t pairs = a.frequencies.shape[0];
  float* cosines = angles;
  float* sines = angles + pairs;
  Angles(static_cast<float>(a.positions.as<int32_t>()[row]), a.frequencies.as<float>(), pairs,
         a.magnitude, cosines, sines);
  for (int64_t h = 0; h < a.x.shape[1]; ++h) {
    float* x = a.x.as<float>() + row * a.x.stride[0] + h * a.x.stride[1];
    if (a.interleaved) {
      RotatePairs(x, cosines, sines, pairs);
    } else {
      RotateHalves(x, cosines, sines, pairs);
    }
  }
}

LONGSPAN_AVX2 void RotateRowAvx2(const RopeArgs& a, int64_t row, float* angles) {
  RotateRow(a, row, angles);
}
void RotateRowPortable(const RopeArgs& a, int64_t row, float* angles) { RotateRow(a, row, angles); }

}  // namespace

void Rope(BackendContext& context, const RopeArgs& a) {
  const auto rotate = context.simd == Simd::kPortable ? RotateRowPortable : RotateRowAvx2;
  const size_t bytes = 2 * sizeof(float) * a.frequencies.shape[0];
  context.team.For(a.x.shape[0], 8, [&](int64_t begin, int64_t end, int thread) {
    auto* angles = reinterpret_cast<float*>(context.Scratch(thread, bytes));
    for (int64_t row = begin; row < end; ++row) rotate(a, row, angles);
  });
}

}  // namespace longspan::cpu
