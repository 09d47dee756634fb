#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/kv_page.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

// A block stores one row of the step, its keys (blockIdx.y 0) or its values (1).
template <class T>
__global__ void StoreRow(const T* key, const T* value, int64_t key_row, int64_t key_head,
                         int64_t value_row, int64_t value_head, KvView cache, RaggedBatch batch,
                         int window) {
  const int row = blockIdx.x;
  int s = 0, end = batch.sequences;  // the last sequence that begins at or before the row
  while (end - s > 1) {
    const int middle = (s + end) / 2;
    if (batch.row_begin[middle] <= row) {
      s = middle;
    } else {
      end = middle;
    }
  }
  if (window > 0 && row < batch.row_begin[s + 1] - window) return;
  const int position = batch.start[s] + row - batch.row_begin[s];
  const bool values = blockIdx.y == 1;
  T* page = reinterpret_cast<T*>(Page(cache, s, position) +
                                 (values ? cache.value_offset : cache.key_offset));
  const T* from = values ? value + row * value_row : key + row * key_row;
  const int64_t head_stride = values ? value_head : key_head;
  const int slot = position % cache.page_tokens;
  for (int i = threadIdx.x; i < cache.kv_heads * cache.head_dim; i += kThreads) {
    const int head = i / cache.head_dim, d = i % cache.head_dim;
    page[(int64_t{head} * cache.page_tokens + slot) * cache.head_dim + d] =
        from[head * head_stride + d];
  }
}

template <class T>
void Launch(BackendContext& context, const StoreKvArgs& a) {
  const dim3 grid(a.batch.rows, 2);
  StoreRow<T><<<grid, kThreads, 0, context.stream>>>(
      a.key.as<const T>(), a.value.as<const T>(), a.key.stride[0], a.key.stride[1],
      a.value.stride[0], a.value.stride[1], a.cache, a.batch, a.window);
}

}  // namespace

void StoreKv(BackendContext& context, const StoreKvArgs& a) {
  CHECK(a.key.dtype == a.cache.dtype && a.value.dtype == a.cache.dtype);
  if (a.batch.rows == 0) return;
  if (Info(a.cache.dtype).block_bytes == 4) {
    Launch<uint32_t>(context, a);
  } else {
    Launch<uint16_t>(context, a);
  }
  CheckLaunch(context, "StoreKv");
}

}  // namespace longspan::cuda
