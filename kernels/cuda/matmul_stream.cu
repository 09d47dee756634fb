// Few rows times bf16 weights, streamed. x goes in as two bf16 (its rounding and what that lost),
// which keeps 16 bits of it.
#include "kernels/cuda/matmul_stream.cuh"

namespace longspan::cuda {
namespace {

struct Bf16Form {
  static constexpr int kColumns = 1, kItemColumns = 32, kLeastLines = 8;
  static constexpr int kSlice = 64, kWide = kItemColumns, kGrain = kSlice;
  __host__ __device__ static constexpr int Bytes(int elements) {
    return elements * int{sizeof(Bf16)};
  }

  // Rows of high halves, then rows of low ones, apart so that a warp reads without bank conflicts.
  struct X {
    unsigned char* memory;
    int rows, pitch;
    const unsigned char* lane;  // where this lane's elements of a slice begin, of the high halves

    __host__ __device__ static constexpr int Pitch(int chunk) { return Form::Bytes(chunk) + 64; }
    static int Bytes(int rows, int chunk) { return 2 * rows * Pitch(chunk); }
    __device__ __forceinline__ X(unsigned char* at, int rows_of_x, int chunk)
        : memory(at), rows(rows_of_x), pitch(Pitch(chunk)) {
      // Columns of a product beyond x's rows repeat the last one.
      const int l = threadIdx.x % kWarp;
      lane = memory + min(l / 4, rows - 1) * pitch + l % 4 * 16;
    }

    template <int kThreads>
    __device__ __forceinline__ void Load(const float* x, int64_t stride, int elements) const {
      const int octets = elements / 8;
#pragma unroll 5
      for (int i = threadIdx.x; i < rows * octets; i += kThreads) {
        const int row = i / octets, octet = i - row * octets;
        const auto* from = reinterpret_cast<const float4*>(x + row * stride + octet * 8);
        const float4 v = from[0], w = from[1];
        uint4 high, low;
        SplitBf16(v.x, v.y, &high.x, &low.x);
        SplitBf16(v.z, v.w, &high.y, &low.y);
        SplitBf16(w.x, w.y, &high.z, &low.z);
        SplitBf16(w.z, w.w, &high.w, &low.w);
        unsigned char* to = memory + row * pitch + octet * 16;
        *reinterpret_cast<uint4*>(to) = high;
        *reinterpret_cast<uint4*>(to + rows * pitch) = low;
      }
    }
  };

  // In a stage, a lane's 16 bytes of either half of a slice. Of odd columns it reads the second
  // half first, so that no two lanes read from one bank.
  struct SliceReader {
    uint32_t stage;
    int slice, columns;

    __device__ __forceinline__ void Read(int column, uint4 (&halves)[2]) const {
      const int lane = threadIdx.x % kWarp;
      const bool odd = lane / 4 % 2 == 1;
      const int at = min(column + lane / 4, columns - 1);  // beyond the stage's the last one
      const uint32_t from = stage + Form::Bytes(at * kStep + slice) + lane % 4 * 16;
      const uint4 a = LoadShared<uint4>(from + odd * 64), b = LoadShared<uint4>(from + !odd * 64);
      halves[0] = Select(odd, a, b);
      halves[1] = Select(odd, b, a);
    }

   private:
    static __device__ __forceinline__ uint4 Select(bool second, const uint4& a, const uint4& b) {
      return {second ? b.x : a.x, second ? b.y : a.y, second ? b.z : a.z, second ? b.w : a.w};
    }
  };

  class Sums {
   public:
    // Weights are the products' rows and x's rows their columns, of which a product has 8.
    __device__ __forceinline__ void Add(uint32_t stage, int columns, int slice, const X& x, int at,
                                        int) {
      const unsigned char* from = x.lane + Form::Bytes(at);
      uint4 h[2], l[2];  // halves of the slice
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        h[i] = *reinterpret_cast<const uint4*>(from + i * 64);
        l[i] = *reinterpret_cast<const uint4*>(from + i * 64 + x.rows * x.pitch);
      }
      const SliceReader reader = {stage, slice, columns};
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        uint4 v[2], u[2];
        reader.Read(t * 16, v);
        reader.Read(t * 16 + 8, u);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          Multiply<Bf16>(high_[t], {v[i].x, u[i].x, v[i].y, u[i].y}, h[i].x, h[i].y);
          Multiply<Bf16>(low_[t], {v[i].x, u[i].x, v[i].y, u[i].y}, l[i].x, l[i].y);
          Multiply<Bf16>(high_[t], {v[i].z, u[i].z, v[i].w, u[i].w}, h[i].z, h[i].w);
          Multiply<Bf16>(low_[t], {v[i].z, u[i].z, v[i].w, u[i].w}, l[i].z, l[i].w);
        }
      }
    }
    template <class Put>
    __device__ __forceinline__ void Visit(int rows, Put put) const {
      const int lane = threadIdx.x % kWarp;
      if (lane % 4 * 2 >= rows) return;
#pragma unroll
      for (int i = 0; i < kItemColumns / 4; ++i) {
        put(lane % 4 * 2 + i % 2, i / 2 * 8 + lane / 4, high_[i / 4][i % 4] + low_[i / 4][i % 4]);
      }
    }

   private:
    float high_[2][4] = {}, low_[2][4] = {};
  };

 private:
  using Form = Bf16Form;
};

}  // namespace

bool Streams(const BackendContext& context, const Product& p) {
  if (IsQuantised(p.weight.dtype)) return StreamsBlocks(context, p);
  return Bf16InVectors(p) && HasRoomToStream<Bf16Form>(context, p);
}

void MultiplyStream(BackendContext& context, const Product& p) {
  if (IsQuantised(p.weight.dtype)) return MultiplyStreamOfBlocks(context, p);
  LaunchStream<Bf16Form>(context, p);
}

}  // namespace longspan::cuda
