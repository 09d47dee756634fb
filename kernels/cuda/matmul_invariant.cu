// Any number of rows times bf16 or f16 weights with one order of summation, so that a row's result
// is the same to the bit beside any others (deterministic backends).
//
// `in` is cut into at most kParts parts, at places that depend on `in` alone. The tensor cores sum
// a part 16 elements at a time, in order, and the parts' sums are added in order. With few rows
// each warp of a block sums a part, so that enough weights are under way; with many a block takes
// the parts one after another, for tiles that read each number seldom. The additions are the same.
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {
namespace {

constexpr int kParts = 8;
constexpr int kStep = 64;   // elements of a row that a stage holds
constexpr int kVector = 8;  // elements of 16 bytes

struct Args {
  const void *x, *weights;
  int64_t x_stride, weight_stride;
  void* out;
  int64_t out_stride;
  int rows, in, columns;
  int part;            // steps of a part
  bool half_out;       // out is BF16, else F32
  bool whole_vectors;  // rows of x and of the weights may be read in vectors
};

// A tile of weights' rows (kColumns of out) and x's, and a warp's share of it. Weights are the
// tensor cores' rows, x's rows their columns. In shared memory rows are padded by 16 bytes, so
// that ldmatrix meets no bank twice.
template <int kColumns, int kRows, int kWarpColumns, int kWarpRows, int kStages>
struct Form {
  static constexpr int columns = kColumns, rows = kRows, stages = kStages;
  static constexpr int warp_columns = kWarpColumns, warp_rows = kWarpRows;
  static constexpr int across = kColumns / kWarpColumns;
  static constexpr int team = across * (kRows / kWarpRows) * kWarp;  // threads of a tile
  static constexpr int teams = team == kWarp ? kParts : 1;           // each has a part, or one all
  static constexpr int threads = teams * team;
  static constexpr int stride = kStep + kVector;
  static constexpr int stage = (kColumns + kRows) * stride;  // elements
  static constexpr size_t bytes = sizeof(uint16_t) * teams * stages * stage;
  static_assert(bytes >= sizeof(float) * teams * kColumns * kRows || teams == 1);
  static_assert(bytes <= 163 << 10, "compute capability 8.0 has no more");
};
using Few = Form<16, 16, 16, 16, 3>;  // two blocks a processor
using Some = Form<32, 32, 32, 32, 2>;
using Many = Form<128, 128, 64, 32, 4>;

// grid: tiles of rows, tiles of columns.
template <class T, class F>
__global__ void __launch_bounds__(F::threads) MultiplyParts(const Args a) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int team = threadIdx.x / F::team, thread = threadIdx.x % F::team;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int row0 = blockIdx.x * F::rows, column0 = blockIdx.y * F::columns;
  T* const stages = reinterpret_cast<T*>(memory) + team * F::stages * F::stage;

  // This thread's vector of every kAtOnce-th row of a stage: first the weights', then x's.
  constexpr int kAtOnce = F::team / (kStep / kVector);
  constexpr int kCopies = (F::columns + F::rows) / kAtOnce;
  static_assert(F::columns % kAtOnce == 0);
  const int first = thread / (kStep / kVector), d = thread % (kStep / kVector) * kVector;
  const T* from[kCopies];
  uint32_t present = 0;  // bit c: from[c] is a row that there is
#pragma unroll
  for (int c = 0; c < kCopies; ++c) {
    const bool weight = c * kAtOnce < F::columns;
    const int i = first + c * kAtOnce + (weight ? column0 : row0 - F::columns);
    const int count = weight ? a.columns : a.rows;
    from[c] = static_cast<const T*>(weight ? a.weights : a.x) +
              min(i, count - 1) * (weight ? a.weight_stride : a.x_stride);
    present |= static_cast<uint32_t>(i < count) << c;
  }
  const auto Load = [&](int step, int end) {
    if (step < end) {
      T* const to = stages + step % F::stages * F::stage + first * F::stride + d;
      const int k = step * kStep + d;
#pragma unroll
      for (int c = 0; c < kCopies; ++c) {
        T* const at = to + c * kAtOnce * F::stride;
        const bool valid = (present >> c & 1) != 0 && k < a.in;
        if (a.whole_vectors) {
          CopyAsync(at, from[c] + (valid ? k : 0), valid);
        } else {
          for (int e = 0; e < kVector; ++e) {
            at[e] = valid && k + e < a.in ? from[c][k + e] : FromFloat<T>(0);
          }
        }
      }
    }
    Commit();
  };
  const auto Sync = [] {
    if constexpr (F::team == kWarp) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  float total[F::warp_columns / 16][F::warp_rows / 8][4] = {};
  float sum[F::warp_columns / 16][F::warp_rows / 8][4] = {};
  const int steps = (a.in + kStep - 1) / kStep;
  const int begin = team * a.part;
  const int end = F::teams == 1 ? steps : min(begin + a.part, steps);
  int left = a.part;  // steps of the part
  for (int s = 0; s < F::stages - 1; ++s) Load(begin + s, end);
  for (int step = begin; step < end; ++step) {
    Await<F::stages - 2>();
    Sync();
    Load(step + F::stages - 1, end);
    const T* const stage = stages + step % F::stages * F::stage;
    const T* const weights = stage + warp % F::across * F::warp_columns * F::stride;
    const T* const x = stage + (F::columns + warp / F::across * F::warp_rows) * F::stride;
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t b[F::warp_rows / 16][4];
#pragma unroll
      for (int n = 0; n < F::warp_rows; n += 16) {
        LoadMatrices(b[n / 16],
                     x + (n + lane % 8 + lane / 16 * 8) * F::stride + k + lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int m = 0; m < F::warp_columns; m += 16) {
        uint32_t w[4];
        LoadMatrices(w, weights + (m + lane % 16) * F::stride + k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < F::warp_rows; n += 16) {
          Multiply<T>(sum[m / 16][n / 8], w, b[n / 16][0], b[n / 16][1]);
          Multiply<T>(sum[m / 16][n / 8 + 1], w, b[n / 16][2], b[n / 16][3]);
        }
      }
    }
    if (--left > 0 && step + 1 < end) continue;
    left = a.part;
#pragma unroll
    for (int i = 0; i < F::warp_columns / 16 * F::warp_rows / 8 * 4; ++i) {
      constexpr int kAcross = F::warp_rows / 8 * 4;
      float& part = sum[i / kAcross][i % kAcross / 4][i % 4];
      total[i / kAcross][i % kAcross / 4][i % 4] += part;
      part = 0;
    }
  }

  // Where this lane's element i of the warp's fragment (m, n) lies in the tile.
  const auto Column = [&](int m, int i) {
    return warp % F::across * F::warp_columns + m * 16 + i / 2 * 8 + lane / 4;
  };
  const auto Row = [&](int n, int i) {
    return warp / F::across * F::warp_rows + n * 8 + lane % 4 * 2 + i % 2;
  };
  const auto Each = [&](auto visit) {
#pragma unroll
    for (int m = 0; m < F::warp_columns / 16; ++m) {
#pragma unroll
      for (int n = 0; n < F::warp_rows / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) visit(Column(m, i), Row(n, i), total[m][n][i]);
      }
    }
  };
  const auto Store = [&](int column, int row, float value) {
    if (column0 + column >= a.columns || row0 + row >= a.rows) return;
    const int64_t at = (row0 + row) * a.out_stride + column0 + column;
    if (a.half_out) {
      static_cast<__nv_bfloat16*>(a.out)[at] = FromFloat<__nv_bfloat16>(value);
    } else {
      static_cast<float*>(a.out)[at] = value;
    }
  };
  if constexpr (F::teams == 1) {
    Each(Store);
  } else {
    auto* const sums = reinterpret_cast<float*>(memory);  // [parts, rows, columns]
    constexpr int kTile = F::rows * F::columns;
    __syncthreads();  // no team reads its stages any more
    Each([&](int column, int row, float value) {
      sums[team * kTile + row * F::columns + column] = value;
    });
    __syncthreads();
    for (int i = threadIdx.x; i < kTile; i += F::threads) {
      float all = 0;
#pragma unroll
      for (int p = 0; p < kParts; ++p) all += sums[p * kTile + i];
      Store(i % F::columns, i / F::columns, all);
    }
  }
}

template <class T, class F>
void Launch(BackendContext& context, const Args& a) {
  const auto kernel = MultiplyParts<T, F>;
  if (!Ok(context,
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::bytes),
          "MatMul")) {
    return;
  }
  kernel<<<dim3(Blocks(a.rows, F::rows), Blocks(a.columns, F::columns)), F::threads, F::bytes,
           context.stream>>>(a);
}

template <class T>
void Choose(BackendContext& context, const Args& a) {
  // Large tiles where there are enough of them for half the processors.
  if (a.rows > 2 * Some::rows &&
      2 * Blocks(a.rows, Many::rows) * Blocks(a.columns, Many::columns) >= context.sm_count) {
    Launch<T, Many>(context, a);
  } else if (a.rows > Few::rows) {
    Launch<T, Some>(context, a);
  } else {
    Launch<T, Few>(context, a);
  }
}

bool WholeVectors(const View& v) {
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && v.shape[1] % kVector == 0 &&
         v.stride[0] % kVector == 0;
}

}  // namespace

void MultiplyInvariant(BackendContext& context, const Product& p) {
  CHECK(p.x.dtype == p.weight.dtype) << Info(p.x.dtype).name;
  Args a;
  a.x = p.x.data;
  a.x_stride = p.x.stride[0];
  a.weights = p.weight.data;
  a.weight_stride = p.weight.stride[0];
  a.out = p.out.data;
  a.half_out = p.out.dtype == DType::kBF16;
  a.out_stride = p.out.stride[0];
  a.rows = static_cast<int>(p.rows());
  a.in = static_cast<int>(p.in());
  a.columns = static_cast<int>(p.columns());
  a.part = Blocks(p.in(), kParts * kStep);
  a.whole_vectors = WholeVectors(p.x) && WholeVectors(p.weight);
  switch (p.weight.dtype) {
    case DType::kF16:
      return Choose<__half>(context, a);
    case DType::kBF16:
      return Choose<__nv_bfloat16>(context, a);
    default:
      CHECK(false) << Info(p.weight.dtype).name;
  }
}

}  // namespace longspan::cuda
