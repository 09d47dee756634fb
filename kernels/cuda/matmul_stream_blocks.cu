// Few rows times block weights, streamed in their strips. x becomes int8 in each block of threads;
// products of bytes sum exactly over what shares a scale.
#include "kernels/cuda/block_products.cuh"
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/matmul_stream.cuh"

namespace longspan::cuda {
namespace {

// x's int8, rows apart so that a warp reads without bank conflicts; then of each row's groups the
// scale and the sum of the int8.
struct QuantisedX {
  unsigned char* q;
  float2* groups;
  int rows, pitch, row_groups;

  __host__ __device__ static constexpr int Pitch(int chunk) { return chunk + kQuantisedGroup; }
  static int Bytes(int rows, int chunk) {
    return rows * (Pitch(chunk) + chunk / kQuantisedGroup * int{sizeof(float2)});
  }
  __device__ __forceinline__ QuantisedX(unsigned char* at, int rows_of_x, int chunk)
      : q(at),
        groups(reinterpret_cast<float2*>(at + rows_of_x * Pitch(chunk))),
        rows(rows_of_x),
        pitch(Pitch(chunk)),
        row_groups(chunk / kQuantisedGroup) {}

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
        groups[row * row_groups + octet / 4] = make_float2(scale.value, static_cast<float>(total));
      }
    }
  }
};

// Up to kRows rows of x. A warp takes a strip's 16 rows of 8 groups of 32 elements: weights are the
// products' rows, the groups their columns. What it multiplies group g by is zero but for column g,
// so that of all sums over groups each lane has its own to scale, with no one's scale twice in a
// warp. (With the rows of x as columns, four lanes took the same scales apart.)
template <class B, int kRows>
struct BlockForm {
  static constexpr int kGroups = 8;
  static constexpr int kColumns = kStripRows, kItemColumns = 4 * kStripRows, kLeastLines = 1;
  static constexpr int kSlice = kGroups * kQuantisedGroup, kWide = kStripRows,
                       kGrain = kQuantisedGroup;
  __host__ __device__ static constexpr int Bytes(int elements) {
    return elements / B::kElements * (kStripRows * B::kBytes);
  }

  using X = QuantisedX;

  class Sums {
   public:
    __device__ __forceinline__ void Add(uint32_t stage, int, int slice, const X& x, int at,
                                        int left) {
      const int lane = threadIdx.x % kWarp, column = lane / 4, part = lane % 4;
      const uint32_t strip = stage + Bytes(slice);
      const int groups = kWhole ? kGroups : min(left / kQuantisedGroup, kGroups);
      int2 own[kRows];  // this lane's part of its column's group
      const int place = at + GroupOf(column) * kQuantisedGroup;
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
        const unsigned char* row = x.q + min(b, x.rows - 1) * x.pitch;
        own[b] = column < groups
                     ? PartOfGroup<B>(reinterpret_cast<const int8_t*>(row + place), part)
                     : make_int2(0, 0);
      }
      int dots[kRows][kScales][4] = {};
#pragma unroll
      for (int u = 0; u < kGroups / kUnitGroups; ++u) {
        typename B::Unit rows[2];  // beyond the slice's groups any, times zeros
        B::LoadWords(InShared{BlockAt(strip, u)}, u % B::kUnits, lane, rows);
#pragma unroll
        for (int g = 0; g < kUnitGroups; ++g) {
          const bool its = column == u * kUnitGroups + g;
#pragma unroll
          for (int b = 0; b < kRows; ++b) {
            const int first = its ? own[b].x : 0, second = its ? own[b].y : 0;
            if constexpr (kScales == 1) {
              MultiplyBytes(dots[b][0],
                            {rows[0].words[g][0], rows[1].words[g][0], rows[0].words[g][1],
                             rows[1].words[g][1]},
                            first, second);
            } else {
              MultiplyBytes(dots[b][0], {rows[0].words[g][0], rows[1].words[g][0]}, first);
              MultiplyBytes(dots[b][1], {rows[0].words[g][1], rows[1].words[g][1]}, second);
            }
          }
        }
      }
      // The lane's columns are 2 * part and the next.
      constexpr int kUnitsOfTwo = 2 / kUnitGroups;
      typename B::Unit scales[kUnitsOfTwo][2];
#pragma unroll
      for (int i = 0; i < kUnitsOfTwo; ++i) {
        const int u = kUnitsOfTwo * part + i;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          B::LoadScales(InShared{BlockAt(strip, u)}, u % B::kUnits, column + 8 * r, &scales[i][r]);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (2 * part + c >= groups) break;
        const float2* of_group = x.groups + at / kQuantisedGroup + GroupOf(2 * part + c);
#pragma unroll
        for (int b = 0; b < kRows; ++b) {
          const float2 of_x = of_group[min(b, x.rows - 1) * x.row_groups];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const typename B::Unit& unit = scales[c / kUnitGroups][r];
            float value = 0;
#pragma unroll
            for (int s = 0; s < kScales; ++s) {
              value = fmaf(unit.scale[c % kUnitGroups][s],
                           static_cast<float>(dots[b][s][2 * r + c]), value);
            }
            if constexpr (B::kMin) value = fmaf(-unit.min[c % kUnitGroups], of_x.y, value);
            of_[b][r] = fmaf(of_x.x, value, of_[b][r]);
          }
        }
      }
    }
    template <class Put>
    __device__ __forceinline__ void Visit(int rows, Put put) const {
      const int lane = threadIdx.x % kWarp;
#pragma unroll
      for (int b = 0; b < kRows; ++b) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float sum = of_[b][r];
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
          if (b < rows && lane % 4 == b % 4) put(b, lane / 4 + 8 * r, sum);
        }
      }
    }

   private:
    static constexpr int kScales = B::Unit::kScales, kUnitGroups = B::Unit::kGroups;
    static constexpr bool kWhole = B::kElements == kSlice;  // slices are blocks, none in part there
    static_assert(B::kElements <= kSlice && kGroups % kUnitGroups == 0 && kUnitGroups <= 2);

    // Column `column`'s group, of the slice's; unit u's block.
    static __device__ __forceinline__ int GroupOf(int column) {
      const int u = column / kUnitGroups;
      return u / B::kUnits * (B::kElements / kQuantisedGroup) +
             B::Group(u % B::kUnits, column % kUnitGroups);
    }
    static __device__ __forceinline__ uint32_t BlockAt(uint32_t strip, int u) {
      return strip + u / B::kUnits * (kStripRows * B::kBytes);
    }

    float of_[kRows][2] = {};
  };
};

// Calls visit(BlockForm{}) for the product's type and rows; false for a type that has no blocks.
template <class Visit>
bool VisitForm(const Product& p, Visit visit) {
  return VisitBlocks(p.weight.dtype, [&](auto format) {
    using B = decltype(format);
    if (p.rows() == 1) {
      visit(BlockForm<B, 1>{});
    } else if (p.rows() == 2) {
      visit(BlockForm<B, 2>{});
    } else {
      visit(BlockForm<B, kStreamBlockRows>{});
    }
  });
}

}  // namespace

bool StreamsBlocks(const BackendContext& context, const Product& p) {
  bool room = false;
  VisitForm(p, [&](auto form) { room = HasRoomToStream<decltype(form)>(context, p); });
  return room && p.rows() <= kStreamBlockRows &&
         reinterpret_cast<uintptr_t>(p.x.data) % sizeof(float4) == 0 && p.x.stride[0] % 4 == 0;
}

void MultiplyStreamOfBlocks(BackendContext& context, const Product& p) {
  CHECK(VisitForm(p, [&](auto form) { LaunchStream<decltype(form)>(context, p); }))
      << Info(p.weight.dtype).name;
}

}  // namespace longspan::cuda
