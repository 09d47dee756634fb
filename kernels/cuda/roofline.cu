#include "kernels/cuda/roofline.h"

#include <algorithm>

#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kRepeats = 10;
constexpr size_t kReadBytes = size_t{2} << 30;  // far more than any L2
constexpr int64_t kSide = 8192;

__global__ void __launch_bounds__(kThreads) Read(const uint4* from, size_t count, unsigned* to) {
  unsigned sum = 0;
  const size_t stride = size_t{gridDim.x} * kThreads;
#pragma unroll 8
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    const uint4 v = from[i];
    sum += v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x9e3779b9u) *to = sum;  // never, but the compiler does not know
}

// Numbers as a model has them: a tensor core that multiplies zeros draws less power and is clocked
// higher.
__global__ void __launch_bounds__(kThreads) FillAtRandom(__nv_bfloat16* to, size_t count) {
  for (size_t i = size_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += size_t{gridDim.x} * kThreads) {
    unsigned bits = static_cast<unsigned>(i) * 0x9e3779b9u;
    bits = (bits ^ (bits >> 16)) * 0x85ebca6bu;
    bits ^= bits >> 13;
    to[i] = __float2bfloat16(static_cast<float>(bits) * 0x1p-31f - 1);
  }
}

// Best seconds of `work`, which enqueues.
template <class Work>
double BestSeconds(BackendContext& context, Work work) {
  cudaEvent_t begin, end;
  Ok(context, cudaEventCreate(&begin), "creating an event");
  Ok(context, cudaEventCreate(&end), "creating an event");
  float best = 0;
  for (int i = 0; i < kRepeats && context.fault.empty(); ++i) {
    cudaEventRecord(begin, context.stream);
    work();
    cudaEventRecord(end, context.stream);
    Ok(context, cudaEventSynchronize(end), "measuring");
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (i > 0)
      best = best == 0 ? milliseconds : std::min(best, milliseconds);  // the first warms up
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return best * 1e-3;
}

}  // namespace

Roofline MeasureRoofline(BackendContext& context) {
  void* memory = nullptr;
  if (!context.fault.empty() || cudaMalloc(&memory, kReadBytes) != cudaSuccess) {
    cudaGetLastError();
    return {};
  }
  Ok(context, cudaMemsetAsync(memory, 0, kReadBytes, context.stream), "clearing memory");
  const auto* words = static_cast<const uint4*>(memory);
  const double read = BestSeconds(context, [&] {
    Read<<<4 * context.sm_count, kThreads, 0, context.stream>>>(
        words, kReadBytes / sizeof(uint4), static_cast<unsigned*>(context.workspace));
  });
  // x and weight [side, side] BF16, out [side, side] F32.
  auto* numbers = static_cast<__nv_bfloat16*>(memory);
  constexpr int64_t kMatrix = kSide * kSide;
  FillAtRandom<<<4 * context.sm_count, kThreads, 0, context.stream>>>(numbers, 2 * kMatrix);
  MatMulArgs product;
  product.x = View::Matrix(numbers, DType::kBF16, kSide, kSide);
  product.parts[0] = View::Matrix(numbers + kMatrix, DType::kBF16, kSide, kSide);
  product.out = View::Matrix(numbers + 2 * kMatrix, DType::kF32, kSide, kSide);
  const double multiply = BestSeconds(context, [&] { MatMul(context, product); });
  cudaFree(memory);
  if (read <= 0 || multiply <= 0) return {};
  return {static_cast<double>(kReadBytes) / read, 2.0 * kSide * kSide * kSide / multiply};
}

}  // namespace longspan::cuda
