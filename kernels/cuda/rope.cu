#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

// A thread turns one pair of every head of a row: the angle is the same in all of them. The product
// is rounded to float, as the reference models do it; sincosf reduces large angles exactly.
__global__ void Rotate(float* x, int64_t row_stride, int64_t head_stride, int heads,
                       const int32_t* positions, const float* frequencies, int pairs,
                       bool interleaved, float magnitude) {
  const int pair = blockIdx.x * kThreads + threadIdx.x;
  if (pair >= pairs) return;
  const int64_t row = blockIdx.y;
  float sine, cosine;
  sincosf(static_cast<float>(positions[row]) * frequencies[pair], &sine, &cosine);
  sine *= magnitude;
  cosine *= magnitude;
  const int first = interleaved ? 2 * pair : pair;
  const int second = interleaved ? first + 1 : pair + pairs;
  for (int h = 0; h < heads; ++h) {
    float* head = x + row * row_stride + h * head_stride;
    const float a = head[first], b = head[second];
    head[first] = a * cosine - b * sine;
    head[second] = b * cosine + a * sine;
  }
}

}  // namespace

void Rope(BackendContext& context, const RopeArgs& a) {
  if (a.x.elements() == 0) return;
  const int pairs = static_cast<int>(a.frequencies.shape[0]);
  const dim3 grid(Blocks(pairs, kThreads), static_cast<unsigned>(a.x.shape[0]));
  Rotate<<<grid, kThreads, 0, context.stream>>>(
      a.x.as<float>(), a.x.stride[0], a.x.stride[1], static_cast<int>(a.x.shape[1]),
      a.positions.as<int32_t>(), a.frequencies.as<float>(), pairs, a.interleaved, a.magnitude);
  CheckLaunch(context, "Rope");
}

}  // namespace longspan::cuda
