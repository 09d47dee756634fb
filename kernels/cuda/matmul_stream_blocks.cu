// Few rows times block weights, streamed in their strips. x becomes int8 in each block of threads;
// products of bytes sum exactly over what shares a scale.
#include "kernels/cuda/block_products.cuh"
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/matmul_stream.cuh"

namespace longspan::cuda {
namespace {

// x's int8, rows apart so that a warp reads without bank conflicts; then of each group of each of 8
// rows its scale and the sum of its int8, undefined beyond x's rows.
struct QuantisedX {
  static constexpr int kGroupBytes = kStreamRows * int{sizeof(float2)};

  unsigned char* q;
  float2* groups;
  int rows, pitch;

  __host__ __device__ static constexpr int Pitch(int chunk) { return chunk + kQuantisedGroup; }
  static int Bytes(int rows, int chunk) {
    return rows * Pitch(chunk) + chunk / kQuantisedGroup * kGroupBytes;
  }
  __device__ __forceinline__ QuantisedX(unsigned char* at, int rows_of_x, int chunk)
      : q(at),
        groups(reinterpret_cast<float2*>(at + rows_of_x * Pitch(chunk))),
        rows(rows_of_x),
        pitch(Pitch(chunk)) {}

  // A thread has 8 elements, four have a group.
  template <int kThreads>
  __device__ __forceinline__ void Load(const float* x, int64_t stride, int elements) const {
    const int octets = elements / 8;
    const unsigned four = 15u << threadIdx.x % kWarp / 4 * 4;
#pragma unroll 3
    for (int i = threadIdx.x; i < rows * octets; i += kThreads) {
      const int row = i / octets, octet = i - row * octets;
      const auto* from = reinterpret_cast<const float4*>(x + row * stride + octet * 8);
      const float4 v = from[0], w = from[1];
      const float values[8] = {v.x, v.y, v.z, v.w, w.x, w.y, w.z, w.w};
      unsigned magnitude = 0;
#pragma unroll
      for (const float value : values) magnitude = max(magnitude, Magnitude(value));
      magnitude = max(magnitude, __shfl_xor_sync(four, magnitude, 1));
      magnitude = max(magnitude, __shfl_xor_sync(four, magnitude, 2));
      const ScaleOfX scale(magnitude);
      int total = 0;
      uint32_t words[2] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int level = scale.Level(values[e]);
        total += level;
        words[e / 4] |= (static_cast<uint32_t>(level) & 255) << e % 4 * 8;
      }
      total += __shfl_xor_sync(four, total, 1);
      total += __shfl_xor_sync(four, total, 2);
      *reinterpret_cast<uint2*>(q + row * pitch + octet * 8) = make_uint2(words[0], words[1]);
      if (octet % 4 == 0) {
        groups[octet / 4 * kStreamRows + row] = make_float2(scale.value, static_cast<float>(total));
      }
    }
  }
};

template <class B>
struct BlockForm {
  static constexpr int kColumns = kStripRows;
  __host__ __device__ static constexpr int Bytes(int elements) {
    return elements / B::kElements * (kStripRows * B::kBytes);
  }
  __device__ static int Share(int, int) { return 1; }
  static int MostBlocks(int lines) { return lines; }

  using X = QuantisedX;

  class Sums {
   public:
    __device__ __forceinline__ void Add(uint32_t stage, int strips, int slice, const X& x, int at) {
      constexpr int kUnit = kQuantisedGroup * B::Unit::kGroups;  // elements
      const int lane = threadIdx.x % kWarp, part = lane % 4;
      const int first = at - slice % B::kElements;  // of the block, in the chunk
      const unsigned char* q = x.q + min(lane / 4, x.rows - 1) * x.pitch + first;
      const float2* groups = x.groups + first / kQuantisedGroup * kStreamRows + 2 * part;
#pragma unroll
      for (int u = 0; u < kSlice / kUnit; ++u) {
        const int element = slice + u * kUnit;
        const int unit = element % B::kElements / kUnit;
        // Blocks of one unit follow each other.
        const int beyond = B::kUnits == 1 ? u * (B::kElements / kQuantisedGroup) : 0;
#pragma unroll
        for (int m = 0; m < kStrips; ++m) {
          if (m >= strips) break;
          typename B::Unit rows[2];
          B::LoadUnit(InShared{stage + m * Bytes(kStep) + Bytes(element)}, unit, lane, rows);
#pragma unroll
          for (int g = 0; g < B::Unit::kGroups; ++g) {
            const int group = beyond + B::Group(unit, g);
            const int2 bytes =
                PartOfGroup<B>(reinterpret_cast<const int8_t*>(q + group * kQuantisedGroup), part);
            const auto two = *reinterpret_cast<const float4*>(groups + group * kStreamRows);
            AddGroup<B>(rows, g, bytes, two, of_[m]);
          }
        }
      }
    }
    __device__ __forceinline__ float At(int i) const { return of_[i / 4][i % 4]; }

   private:
    static constexpr int kStrips = kItemColumns / kStripRows;
    float of_[kStrips][4] = {};
  };
};

}  // namespace

bool StreamsBlocks(const BackendContext& context, const Product& p) {
  bool room = false;
  VisitBlocks(p.weight.dtype, [&](auto format) {
    room = HasRoomToStream<BlockForm<decltype(format)>>(context, p);
  });
  return room && p.rows() <= kStreamBlockRows &&
         reinterpret_cast<uintptr_t>(p.x.data) % sizeof(float4) == 0 && p.x.stride[0] % 4 == 0;
}

void MultiplyStreamOfBlocks(BackendContext& context, const Product& p) {
  CHECK(VisitBlocks(p.weight.dtype, [&](auto format) {
    LaunchStream<BlockForm<decltype(format)>>(context, p);
  })) << Info(p.weight.dtype).name;
}

}  // namespace longspan::cuda
