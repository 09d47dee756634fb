// Embedding rows of any weight type.
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
struct PlainTable {
  const T* rows;
  int64_t stride;
  __device__ float At(int64_t row, int64_t i) const { return ToFloat(rows[row * stride + i]); }
};

template <class B>
struct StripTable {
  const uint8_t* strips;
  int64_t blocks;  // of a row
  __device__ float At(int64_t row, int64_t i) const {
    const int64_t place = row / kStripRows * blocks + i / B::kElements;
    const Block<B> block = {strips + place * kStripRows * B::kBytes,
                            static_cast<int>(row % kStripRows)};
    return B::Element(block, static_cast<int>(i % B::kElements));
  }
};

// A token beyond the vocabulary is a mistake of ours: the trap becomes the device's fault.
template <class Table>
__global__ void EmbedRows(const Table table, int64_t vocab, const int32_t* tokens, float* out,
                          int64_t out_stride, int64_t dim, float scale) {
  const int64_t d = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t token = tokens[blockIdx.y];
  if (token < 0 || token >= vocab) __trap();
  if (d >= dim) return;
  out[blockIdx.y * out_stride + d] = table.At(token, d) * scale;
}

template <class Table>
void Launch(BackendContext& context, const EmbedArgs& a, const Table& table) {
  const int64_t dim = a.table.shape[1];
  const dim3 grid(Blocks(dim, kThreads), static_cast<unsigned>(a.tokens.shape[0]));
  EmbedRows<<<grid, kThreads, 0, context.stream>>>(table, a.table.shape[0], a.tokens.as<int32_t>(),
                                                   a.out.as<float>(), a.out.stride[0], dim,
                                                   a.scale);
}

template <class T>
void LaunchPlain(BackendContext& context, const EmbedArgs& a) {
  Launch(context, a, PlainTable<T>{a.table.as<const T>(), a.table.stride[0]});
}

}  // namespace

void Embed(BackendContext& context, const EmbedArgs& a) {
  CHECK(a.tokens.dtype == DType::kI32 && a.out.dtype == DType::kF32);
  CHECK_EQ(a.out.shape[0], a.tokens.shape[0]);
  CHECK_EQ(a.out.shape[1], a.table.shape[1]);
  if (a.out.elements() == 0) return;
  const DType type = a.table.dtype;
  const int64_t dim = a.table.shape[1];
  if (type == DType::kF32) {
    LaunchPlain<float>(context, a);
  } else if (type == DType::kF16) {
    LaunchPlain<__half>(context, a);
  } else if (type == DType::kBF16) {
    LaunchPlain<__nv_bfloat16>(context, a);
  } else {
    CHECK(a.table.packed);
    CHECK(VisitBlocks(type, [&](auto format) {
      using B = decltype(format);
      Launch(context, a, StripTable<B>{a.table.as<const uint8_t>(), dim / B::kElements});
    })) << Info(type).name;
  }
  CheckLaunch(context, "Embed");
}

}  // namespace longspan::cuda
