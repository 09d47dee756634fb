// Many rows: cuBLASLt on the tensor cores, with both sides in one type. Block weights become bf16 a
// panel of outputs at a time. On a deterministic backend it only rounds x.
#include <algorithm>
#include <map>
#include <tuple>

#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"

namespace longspan::cuda {

// One product of cuBLASLt for a shape: column-major, so outᵀ = weight · xᵀ with the weight
// transposed.
struct Plan {
  cublasLtMatmulDesc_t operation = nullptr;
  cublasLtMatrixLayout_t weight = nullptr, x = nullptr, out = nullptr;
  cublasLtMatmulAlgo_t algorithm;
};

struct TilePlans {
  // type, out's type, rows, columns, in, x's and out's row stride
  using Key = std::tuple<DType, DType, int64_t, int64_t, int64_t, int64_t, int64_t>;
  std::map<Key, Plan> plans;
};

void FreeTilePlans(TilePlans* plans) {
  if (plans == nullptr) return;
  for (auto& [key, plan] : plans->plans) {
    cublasLtMatrixLayoutDestroy(plan.weight);
    cublasLtMatrixLayoutDestroy(plan.x);
    cublasLtMatrixLayoutDestroy(plan.out);
    cublasLtMatmulDescDestroy(plan.operation);
  }
  delete plans;
}

namespace {

constexpr int kThreads = 256;
constexpr size_t kLibraryBytes = size_t{32} << 20;  // cuBLAS asks for this much on Hopper
constexpr size_t kXBytes = size_t{96} << 20;
constexpr size_t kPanelBytes = size_t{96} << 20;
constexpr size_t kMostPlans = 4096;

cudaDataType_t LibraryType(DType type) {
  return type == DType::kF32 ? CUDA_R_32F : type == DType::kF16 ? CUDA_R_16F : CUDA_R_16BF;
}

bool Make(BackendContext& context, const TilePlans::Key& key, Plan* plan) {
  const auto [type, out_type, rows, columns, in, x_stride, out_stride] = key;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const size_t workspace = kLibraryBytes;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  bool ok =
      Ok(context, cublasLtMatmulDescCreate(&plan->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
         "cuBLASLt") &&
      Ok(context,
         cublasLtMatmulDescSetAttribute(plan->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                        sizeof transposed),
         "cuBLASLt") &&
      Ok(context, cublasLtMatrixLayoutCreate(&plan->weight, LibraryType(type), in, columns, in),
         "cuBLASLt") &&
      Ok(context, cublasLtMatrixLayoutCreate(&plan->x, LibraryType(type), in, rows, x_stride),
         "cuBLASLt") &&
      Ok(context,
         cublasLtMatrixLayoutCreate(&plan->out, LibraryType(out_type), columns, rows, out_stride),
         "cuBLASLt") &&
      Ok(context, cublasLtMatmulPreferenceCreate(&preference), "cuBLASLt");
  if (!ok) return false;
  ok = Ok(context,
          cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                               &workspace, sizeof workspace),
          "cuBLASLt");
  const uint32_t alignment = 16;
  for (auto side :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    ok = ok &&
         Ok(context,
            cublasLtMatmulPreferenceSetAttribute(preference, side, &alignment, sizeof alignment),
            "cuBLASLt");
  }
  ok = ok &&
       Ok(context,
          cublasLtMatmulAlgoGetHeuristic(context.cublas, plan->operation, plan->weight, plan->x,
                                         plan->out, plan->out, preference, 1, &found, &count),
          "cuBLASLt has no algorithm");
  cublasLtMatmulPreferenceDestroy(preference);
  if (ok) plan->algorithm = found.algo;
  return ok;
}

// out = x · weightᵀ, both of `type` in device memory.
void Multiply(BackendContext& context, DType type, const void* weight, const void* x,
              int64_t x_stride, int64_t rows, int64_t columns, int64_t in, DType out_type,
              void* out, int64_t out_stride, void* library_memory) {
  if (context.tile_plans == nullptr) context.tile_plans = new TilePlans;
  auto& plans = context.tile_plans->plans;
  const TilePlans::Key key{type, out_type, rows, columns, in, x_stride, out_stride};
  auto it = plans.find(key);
  if (it == plans.end()) {
    if (plans.size() >= kMostPlans) {
      FreeTilePlans(context.tile_plans);
      context.tile_plans = nullptr;
      return Multiply(context, type, weight, x, x_stride, rows, columns, in, out_type, out,
                      out_stride, library_memory);
    }
    it = plans.emplace(key, Plan()).first;
    if (!Make(context, key, &it->second)) return;
  }
  const Plan& plan = it->second;
  const float one = 1, zero = 0;
  Ok(context,
     cublasLtMatmul(context.cublas, plan.operation, &one, weight, plan.weight, x, plan.x, &zero,
                    out, plan.out, out, plan.out, &plan.algorithm, library_memory, kLibraryBytes,
                    context.stream),
     "cuBLASLt");
}

View MatrixOf(const void* data, DType type, int64_t rows, int64_t columns, int64_t stride) {
  return {const_cast<void*>(data), type, 2, {rows, columns, 0}, {stride, 1, 0}};
}

template <class T>
__global__ void Round(const float* x, int64_t stride, T* out, int64_t in) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < in) out[blockIdx.y * in + i] = FromFloat<T>(x[blockIdx.y * stride + i]);
}

}  // namespace

void MultiplyTiles(BackendContext& context, const Product& p) {
  auto* memory = static_cast<std::byte*>(context.Workspace(kLibraryBytes + kXBytes + kPanelBytes));
  void* library = memory;
  void* rounded = memory + kLibraryBytes;
  auto* panel = reinterpret_cast<__nv_bfloat16*>(memory + kLibraryBytes + kXBytes);
  const int64_t in = p.in();
  const DType weight_type = p.weight.dtype, type = TileType(weight_type);
  const bool blocks = IsQuantised(weight_type), rounds = p.x.dtype != type;
  // Whether x comes rounded or not: sums in the library's order depend on how many rows it has.
  const int64_t most_rows = static_cast<int64_t>(kXBytes) / (2 * in);
  const int64_t most_columns =
      blocks ? static_cast<int64_t>(kPanelBytes) / (2 * in) / 64 * 64 : p.columns();
  CHECK(most_rows > 0 && most_columns > 0) << "rows of " << in;
  for (int64_t row = 0; row < p.rows(); row += most_rows) {
    const int64_t rows = std::min(most_rows, p.rows() - row);
    const void* x = p.x.row(row);
    if (rounds) {
      const dim3 grid(Blocks(in, kThreads), static_cast<unsigned>(rows));
      const auto round = [&](auto* to) {
        Round<<<grid, kThreads, 0, context.stream>>>(static_cast<const float*>(x), p.x.stride[0],
                                                     to, in);
      };
      if (type == DType::kF16) {
        round(static_cast<__half*>(rounded));
      } else {
        round(static_cast<__nv_bfloat16*>(rounded));
      }
      x = rounded;
    }
    for (int64_t column = 0; column < p.columns(); column += most_columns) {
      const int64_t columns = std::min(most_columns, p.columns() - column);
      const void* weight = p.weight.row(column);
      if (blocks) {
        View part = p.weight;  // whole strips, but for the last
        part.data = p.weight.row(column);
        part.shape[0] = columns;
        UnpackStrips(context, part, panel);
        weight = panel;
      }
      const int64_t x_stride = rounds ? in : p.x.stride[0];
      void* out = static_cast<std::byte*>(p.out.row(row)) + BytesOf(p.out.dtype, column);
      if (context.deterministic) {
        MultiplyInvariant(context, {MatrixOf(x, type, rows, in, x_stride),
                                    MatrixOf(weight, type, columns, in, in),
                                    MatrixOf(out, p.out.dtype, rows, columns, p.out.stride[0])});
      } else {
        Multiply(context, type, weight, x, x_stride, rows, columns, in, p.out.dtype, out,
                 p.out.stride[0], library);
      }
    }
  }
}

}  // namespace longspan::cuda
