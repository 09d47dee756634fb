#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/kv_page.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 128;

// How the heads of keys or of values lie, counted in what a thread moves at a time.
template <class T>
struct Heads {
  const T* from;
  int64_t row, head;  // strides
  int64_t offset;     // bytes, in a page
};

// A block stores one row of the step, its keys (blockIdx.y 0) or its values (1). `width`: of a
// head.
template <class T>
__global__ void StoreRow(const Heads<T> keys, const Heads<T> values, int width, KvView cache,
                         RaggedBatch batch, int window) {
  LetNextBegin();
  const int row = blockIdx.x;
  int s = -1;  // the last sequence that begins at or before the row
  for (int first = 0; first < batch.sequences; first += kThreads) {
    const int mine = first + threadIdx.x;
    s += __syncthreads_count(mine < batch.sequences && batch.row_begin[mine] <= row);
  }
  if (window > 0 && row < batch.row_begin[s + 1] - window) return;
  const int position = batch.start[s] + row - batch.row_begin[s];
  Heads<T> heads = keys;  // a reference to either would put both in local memory
  if (blockIdx.y == 1) heads = values;
  T* page = reinterpret_cast<T*>(Page(cache, s, position) + heads.offset);
  const int slot = position % cache.page_tokens;
  for (int i = threadIdx.x; i < cache.kv_heads * width; i += kThreads) {
    const int head = i / width, d = i % width;
    page[(int64_t{head} * cache.page_tokens + slot) * width + d] =
        heads.from[row * heads.row + head * heads.head + d];
  }
}

template <class T>
Heads<T> HeadsOf(const View& view, int64_t offset) {
  return {view.as<const T>(), BytesOf(view.dtype, view.stride[0]) / int64_t{sizeof(T)},
          BytesOf(view.dtype, view.stride[1]) / int64_t{sizeof(T)}, offset};
}

// Whether all heads, here and in pages, begin at multiples of T and consist of whole ones.
template <class T>
bool Wholly(const StoreKvArgs& a) {
  static_assert(kPageUnitBytes % sizeof(T) == 0);
  int64_t bytes = BytesOf(a.cache.dtype, a.cache.head_dim) | a.cache.key_offset |
                  a.cache.value_offset | reinterpret_cast<intptr_t>(a.cache.arena);
  for (const View* view : {&a.key, &a.value}) {
    bytes |= reinterpret_cast<intptr_t>(view->data) | BytesOf(view->dtype, view->stride[0]) |
             BytesOf(view->dtype, view->stride[1]);
  }
  return bytes % int64_t{sizeof(T)} == 0;
}

template <class T>
void Launch(BackendContext& context, const StoreKvArgs& a) {
  const int width = static_cast<int>(BytesOf(a.cache.dtype, a.cache.head_dim) / sizeof(T));
  StoreRow<T><<<dim3(a.batch.rows, 2), kThreads, 0, context.stream>>>(
      HeadsOf<T>(a.key, a.cache.key_offset), HeadsOf<T>(a.value, a.cache.value_offset), width,
      a.cache, a.batch, a.window);
}

}  // namespace

void StoreKv(BackendContext& context, const StoreKvArgs& a) {
  CHECK(a.key.dtype == a.cache.dtype && a.value.dtype == a.cache.dtype);
  if (a.batch.rows == 0) return;
  if (Wholly<uint4>(a)) {
    Launch<uint4>(context, a);
  } else if (Wholly<uint32_t>(a)) {
    Launch<uint32_t>(context, a);
  } else {
    Launch<uint16_t>(context, a);
  }
  CheckLaunch(context, "StoreKv");
}

}  // namespace longspan::cuda
