// RmsNorm and AddRmsNorm: a block takes a row. Held rows stay in registers from the one time that
// they are read, weights on their way before the first sum; other rows are read again.
#include <algorithm>

#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kStreamThreads = 256;

// AddRmsNormArgs as kernels take them; RmsNorm is the form without x.
struct Rows {
  const float* x;         // nullptr: nothing is added, residual only read
  const float* x_weight;  // nullptr: x is added as it is
  float* residual;
  const float* weight;  // nullptr: out is not written
  void* out;            // may be residual
  int64_t x_row, residual_row, out_row;
  int dim;
  float eps;
};

// The sum of all threads' values. `parts` holds a number for each warp and serves one call.
__device__ __forceinline__ float BlockSum(float value, float* parts) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  value = WarpSum(value);
  if (lane == 0) parts[warp] = value;
  __syncthreads();
  return WarpSum(lane < blockDim.x / kWarp ? parts[lane] : 0.0f);
}

__device__ __forceinline__ float Scale(const Rows& a, float squares) {
  return 1.0f / sqrtf(squares / static_cast<float>(a.dim) + a.eps);
}

// A row's vectors i, i + threads, …: zero beyond its end, and of no row.
template <int kVectors>
struct Held {
  Floats<4> at[kVectors];

  __device__ __forceinline__ Held(const float* row, int vectors) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = threadIdx.x + v * blockDim.x;
      at[v] =
          row != nullptr && i < vectors ? reinterpret_cast<const Floats<4>*>(row)[i] : Floats<4>{};
    }
  }
  template <class T>
  __device__ __forceinline__ void StoreTo(T* row, int vectors) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = threadIdx.x + v * blockDim.x;
      if (i < vectors) Store(at[v], row + 4 * i);
    }
  }
  __device__ __forceinline__ float Squares() const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i) sum += at[i / 4].at[i % 4] * at[i / 4].at[i % 4];
    return sum;
  }
  __device__ __forceinline__ void Multiply(float scale, const Held& weight) {
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i)
      at[i / 4].at[i % 4] *= scale * weight.at[i / 4].at[i % 4];
  }
  __device__ __forceinline__ void Add(const Held& x) {
#pragma unroll
    for (int i = 0; i < 4 * kVectors; ++i) at[i / 4].at[i % 4] += x.at[i / 4].at[i % 4];
  }
};

template <class T, int kVectors>
__global__ void __launch_bounds__(kMaxThreads) NormHeld(const Rows a) {
  LetNextBegin();
  __shared__ float parts[2][kMaxThreads / kWarp];
  const int vectors = a.dim / 4;
  const Held<kVectors> x_weight(a.x_weight, vectors), weight(a.weight, vectors);
  AwaitEarlier();
  float* residual = a.residual + blockIdx.x * a.residual_row;
  Held<kVectors> x(a.x != nullptr ? a.x + blockIdx.x * a.x_row : nullptr, vectors);
  Held<kVectors> sum(residual, vectors);
  if (a.x != nullptr) {
    if (a.x_weight != nullptr) x.Multiply(Scale(a, BlockSum(x.Squares(), parts[0])), x_weight);
    sum.Add(x);
    sum.StoreTo(residual, vectors);
  }
  if (a.weight == nullptr) return;
  sum.Multiply(Scale(a, BlockSum(sum.Squares(), parts[1])), weight);
  sum.StoreTo(static_cast<T*>(a.out) + blockIdx.x * a.out_row, vectors);
}

// Rows of any length and alignment. A thread reads again only what it wrote itself.
template <class T>
__global__ void NormStreamed(const Rows a) {
  __shared__ float parts[2][kStreamThreads / kWarp];
  const float* x = a.x + blockIdx.x * a.x_row;
  float* residual = a.residual + blockIdx.x * a.residual_row;
  T* out = static_cast<T*>(a.out) + blockIdx.x * a.out_row;
  float squares = 0, scale = 1;
  if (a.x_weight != nullptr) {
    for (int d = threadIdx.x; d < a.dim; d += kStreamThreads) squares += x[d] * x[d];
    scale = Scale(a, BlockSum(squares, parts[0]));
  }
  squares = 0;
  for (int d = threadIdx.x; d < a.dim; d += kStreamThreads) {
    float sum = residual[d];
    if (a.x != nullptr) {
      sum += a.x_weight != nullptr ? x[d] * scale * a.x_weight[d] : x[d];
      residual[d] = sum;
    }
    squares += sum * sum;
  }
  if (a.weight == nullptr) return;
  scale = Scale(a, BlockSum(squares, parts[1]));
  for (int d = threadIdx.x; d < a.dim; d += kStreamThreads) {
    out[d] = FromFloat<T>(residual[d] * scale * a.weight[d]);
  }
}

template <class T, int kVectors>
void LaunchHeld(BackendContext& context, const Rows& a, unsigned rows) {
  const int threads = Blocks(a.dim / 4, kVectors * kWarp) * kWarp;
  LaunchEarly(context, NormHeld<T, kVectors>, dim3(rows), threads, a);
}

template <class T>
void LaunchFor(BackendContext& context, const Rows& a, unsigned rows, bool fours) {
  if (fours && a.dim <= 2 * 4 * kMaxThreads) {
    LaunchHeld<T, 2>(context, a, rows);
  } else if (fours && a.dim <= 4 * 4 * kMaxThreads) {
    LaunchHeld<T, 4>(context, a, rows);
  } else {
    NormStreamed<T><<<rows, kStreamThreads, 0, context.stream>>>(a);
  }
}

void Launch(BackendContext& context, const AddRmsNormArgs& a, const char* op) {
  if (a.residual.elements() == 0) return;
  const Rows rows = {a.x.as<const float>(),
                     a.x_weight.as<const float>(),
                     a.residual.as<float>(),
                     a.weight.as<const float>(),
                     a.out.data,
                     a.x.stride[0],
                     a.residual.stride[0],
                     a.out.stride[0],
                     static_cast<int>(a.residual.shape[1]),
                     a.eps};
  const auto count = static_cast<unsigned>(a.residual.shape[0]);
  const bool fours = WholeFours({&a.x, &a.x_weight, &a.residual, &a.weight, &a.out});
  VisitInput(a.out.dtype,
             [&](auto number) { LaunchFor<decltype(number)>(context, rows, count, fours); });
  CheckLaunch(context, op);
}

}  // namespace

void RmsNorm(BackendContext& context, const RmsNormArgs& a) {
  Launch(context,
         {.x = {}, .x_weight = {}, .residual = a.x, .weight = a.weight, .out = a.out, .eps = a.eps},
         "RmsNorm");
}

void AddRmsNorm(BackendContext& context, const AddRmsNormArgs& a) {
  Launch(context, a, "AddRmsNorm");
}

}  // namespace longspan::cuda
