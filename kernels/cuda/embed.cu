// Embedding rows of any weight type.
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;

// A token beyond the vocabulary is a mistake of ours: the trap becomes the device's fault.
template <class B>
__global__ void EmbedRows(const uint8_t* table, int64_t row_bytes, int64_t vocab,
                          const int32_t* tokens, float* out, int64_t out_stride, int64_t dim,
                          float scale) {
  const int64_t d = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t token = tokens[blockIdx.y];
  if (token < 0 || token >= vocab) __trap();
  if (d >= dim) return;
  const uint8_t* block = table + token * row_bytes + d / B::kElements * B::kBytes;
  out[blockIdx.y * out_stride + d] = B::Element(block, static_cast<int>(d % B::kElements)) * scale;
}

template <class B>
void Launch(BackendContext& context, const EmbedArgs& a) {
  const int64_t dim = a.table.shape[1];
  const dim3 grid(Blocks(dim, kThreads), static_cast<unsigned>(a.tokens.shape[0]));
  EmbedRows<B><<<grid, kThreads, 0, context.stream>>>(
      a.table.as<const uint8_t>(), BytesOf(a.table.dtype, a.table.stride[0]), a.table.shape[0],
      a.tokens.as<int32_t>(), a.out.as<float>(), a.out.stride[0], dim, a.scale);
}

}  // namespace

void Embed(BackendContext& context, const EmbedArgs& a) {
  CHECK(a.tokens.dtype == DType::kI32 && a.out.dtype == DType::kF32);
  CHECK_EQ(a.out.shape[0], a.tokens.shape[0]);
  CHECK_EQ(a.out.shape[1], a.table.shape[1]);
  if (a.out.elements() == 0) return;
  const DType type = a.table.dtype;
  if (type == DType::kF32) {
    Launch<Plain<float, DType::kF32>>(context, a);
  } else if (type == DType::kF16) {
    Launch<Plain<__half, DType::kF16>>(context, a);
  } else if (type == DType::kBF16) {
    Launch<Plain<__nv_bfloat16, DType::kBF16>>(context, a);
  } else {
    CHECK(VisitBlocks(type, [&](auto b) { Launch<decltype(b)>(context, a); })) << Info(type).name;
  }
  CheckLaunch(context, "Embed");
}

}  // namespace longspan::cuda
