#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/kv_page.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kWarps = 4;  // of a block: a head each

// PrepareQkvArgs as kernels take them.
struct Heads {
  float* qkv;
  const float *query_norm, *key_norm;  // nullptr: none
  const int32_t* positions;
  const float* frequencies;
  void *key, *value;
  int64_t qkv_row, key_row, key_head, value_row, value_head;
  int query_heads, kv_heads, dim, pairs;
  bool interleaved;
  float magnitude, eps;
  KvView cache;
};

// grid: q, k and v heads of a row, kWarps to a block; rows. A lane has the head's numbers and pairs
// lane, lane + 32, …; pairs meet in shared memory. What a head needs besides them is there
// before they are. The angle's product is rounded to float, as the reference models do it; sincosf
// reduces large angles exactly.
template <class T, int kPer>
__global__ void __launch_bounds__(kWarps* kWarp) Prepare(const Heads a) {
  LetNextBegin();
  __shared__ float heads[kWarps][kPer * kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int head = blockIdx.x * kWarps + warp;
  if (head >= a.query_heads + 2 * a.kv_heads) return;
  const int64_t row = blockIdx.y;
  const bool is_query = head < a.query_heads, is_value = head >= a.query_heads + a.kv_heads;
  const float* norm = is_query ? a.query_norm : is_value ? nullptr : a.key_norm;
  const int pairs = is_value ? 0 : a.pairs;
  if (is_query && norm == nullptr && pairs == 0) return;

  float* from = a.qkv + row * a.qkv_row + int64_t{head} * a.dim;
  float x[kPer], weight[kPer], sines[kPer / 2], cosines[kPer / 2];
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int d = lane + i * kWarp;
    weight[i] = norm != nullptr && d < a.dim ? norm[d] : 0.0f;
  }
  const int kv_head = (head - a.query_heads) % a.kv_heads;  // of keys and of values
  T* cached = nullptr;
  if (!is_query && a.cache.arena != nullptr) {
    const int position = a.positions[row];
    std::byte* page = Page(a.cache, static_cast<int>(row), position) +
                      (is_value ? a.cache.value_offset : a.cache.key_offset);
    const int slot = position % a.cache.page_tokens;
    cached = reinterpret_cast<T*>(page) + (int64_t{kv_head} * a.cache.page_tokens + slot) * a.dim;
  }
#pragma unroll
  for (int i = 0; i < kPer / 2; ++i) {
    const int pair = lane + i * kWarp;
    if (pair < pairs) {
      sincosf(static_cast<float>(a.positions[row]) * a.frequencies[pair], &sines[i], &cosines[i]);
      sines[i] *= a.magnitude;
      cosines[i] *= a.magnitude;
    }
  }
  AwaitEarlier();
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int d = lane + i * kWarp;
    x[i] = d < a.dim ? from[d] : 0.0f;
  }

  if (norm != nullptr) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) squares += x[i] * x[i];
    const float scale = 1.0f / sqrtf(WarpSum(squares) / static_cast<float>(a.dim) + a.eps);
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] *= scale * weight[i];
  }
  if (pairs > 0) {
    float* shared = heads[warp];
#pragma unroll
    for (int i = 0; i < kPer; ++i) shared[lane + i * kWarp] = x[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPer / 2; ++i) {
      const int pair = lane + i * kWarp;
      if (pair < pairs) {
        float& first = shared[a.interleaved ? 2 * pair : pair];
        float& second = shared[a.interleaved ? 2 * pair + 1 : pair + pairs];
        const float before = first;
        first = before * cosines[i] - second * sines[i];
        second = second * cosines[i] + before * sines[i];
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] = shared[lane + i * kWarp];
  }

  T* to = is_value ? static_cast<T*>(a.value) + row * a.value_row + kv_head * a.value_head
                   : static_cast<T*>(a.key) + row * a.key_row + kv_head * a.key_head;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const int d = lane + i * kWarp;
    if (d >= a.dim) break;
    if (is_query) {
      from[d] = x[i];
    } else {
      const T number = FromFloat<T>(x[i]);
      to[d] = number;
      if (cached != nullptr) cached[d] = number;
    }
  }
}

template <class T>
void Launch(BackendContext& context, const Heads& a, int64_t rows) {
  const dim3 grid(Blocks(a.query_heads + 2 * a.kv_heads, kWarps), static_cast<unsigned>(rows));
  const auto run = [&](auto kernel) { LaunchEarly(context, kernel, grid, kWarps * kWarp, a); };
  if (a.dim <= 2 * kWarp) {
    run(Prepare<T, 2>);
  } else if (a.dim <= 4 * kWarp) {
    run(Prepare<T, 4>);
  } else {
    run(Prepare<T, 8>);
  }
}

}  // namespace

void PrepareQkv(BackendContext& context, const PrepareQkvArgs& a) {
  CHECK_LE(a.key.shape[2], 8 * kWarp);
  CHECK(a.key.dtype == a.value.dtype);
  CHECK(a.cache.arena == nullptr || a.cache.dtype == a.key.dtype);
  if (a.qkv.elements() == 0) return;
  const Heads heads = {a.qkv.as<float>(),
                       a.query_norm.as<const float>(),
                       a.key_norm.as<const float>(),
                       a.positions.as<const int32_t>(),
                       a.frequencies.as<const float>(),
                       a.key.data,
                       a.value.data,
                       a.qkv.stride[0],
                       a.key.stride[0],
                       a.key.stride[1],
                       a.value.stride[0],
                       a.value.stride[1],
                       static_cast<int>(a.query_heads()),
                       static_cast<int>(a.key.shape[1]),
                       static_cast<int>(a.key.shape[2]),
                       static_cast<int>(a.frequencies.elements()),
                       a.interleaved,
                       a.magnitude,
                       a.eps,
                       a.cache};
  switch (a.key.dtype) {
    case DType::kF32:
      Launch<float>(context, heads, a.qkv.shape[0]);
      break;
    case DType::kBF16:
      Launch<__nv_bfloat16>(context, heads, a.qkv.shape[0]);
      break;
    default:
      CHECK(false) << Info(a.key.dtype).name << " is not a cache type";
  }
  CheckLaunch(context, "PrepareQkv");
}

}  // namespace longspan::cuda
