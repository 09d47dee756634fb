// Few rows times block weights that are not streamed, straight from their strips: one row by byte
// dot products, several on the tensor cores. Products of bytes sum exactly over what shares a
// scale; the rest is fp32, in one order for any several rows.
#include "kernels/cuda/block_products.cuh"
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"

namespace longspan::cuda {
namespace {

constexpr int kQuantiseWarps = 4;  // of a block
constexpr int kWarps = 8;          // of a block that multiplies

// A warp for each group of 32.
__global__ void Quantise(const float* x, int64_t stride, int in, int64_t groups,
                         QuantisedRows out) {
  LetNextBegin();
  const int64_t group = blockIdx.x * int64_t{kQuantiseWarps} + threadIdx.x / kWarp;
  if (group >= groups) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t per_row = in / kQuantisedGroup, row = group / per_row;
  const float value = x[row * stride + group % per_row * kQuantisedGroup + lane];
  const ScaleOfX scale(__reduce_max_sync(0xffffffffu, Magnitude(value)));
  const int level = scale.Level(value);
  out.q[group * kQuantisedGroup + lane] = static_cast<int8_t>(level);
  const int total = __reduce_add_sync(0xffffffffu, level);
  if (lane == 0) {
    out.groups[group % per_row * out.stride + row] =
        make_float2(scale.value, static_cast<float>(total));
  }
}

// Adds to a warp's sums, as of Multiply(), group g of a unit of 16 rows of weights times that group
// of 8 rows of x. `bytes`: this lane's part of the group in x's row lane / 4; `two`: its scale and
// the sum of its int8 in rows lane % 4 * 2 and the next.
template <class B>
__device__ __forceinline__ void AddGroup(const typename B::Unit* rows, int g, int2 bytes,
                                         const float4& two, float (&sum)[4]) {
  constexpr int kScales = B::Unit::kScales;
  int dot[kScales][4] = {};
  if constexpr (kScales == 1) {
    MultiplyBytes(
        dot[0],
        {rows[0].words[g][0], rows[1].words[g][0], rows[0].words[g][1], rows[1].words[g][1]},
        bytes.x, bytes.y);
  } else {
    MultiplyBytes(dot[0], {rows[0].words[g][0], rows[1].words[g][0]}, bytes.x);
    MultiplyBytes(dot[1], {rows[0].words[g][1], rows[1].words[g][1]}, bytes.y);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const typename B::Unit& row = rows[i / 2];
#pragma unroll
    for (int half = 0; half < kScales; ++half) {
      float value = row.scale[g][half] * static_cast<float>(dot[half][i]);
      if constexpr (B::kMin) value = fmaf(-row.min[g], i % 2 == 0 ? two.y : two.w, value);
      sum[i] = fmaf(i % 2 == 0 ? two.x : two.z, value, sum[i]);
    }
  }
}

struct BlockArgs {
  const uint8_t* strips;
  QuantisedRows x;
  float* out;
  int64_t out_stride;
  int rows, in, columns;
};

// One row, by byte dot products: a block of threads multiplies a strip, each of its warps every
// kWarps-th unit.
template <class B>
__global__ void __launch_bounds__(kWarps* kWarp) DotRow(BlockArgs a) {
  using Unit = typename B::Unit;
  constexpr int kAhead = 8 / Unit::kGroups;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, part = lane % 4;
  const int64_t blocks = a.in / B::kElements;
  const uint8_t* strip = a.strips + blockIdx.x * blocks * (kStripRows * B::kBytes);
  const int units = static_cast<int>(blocks) * B::kUnits;
  Unit w[kAhead][2];
  const auto Load = [&](int first) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int u = first + s * kWarps;
      if (u >= units) break;
      LoadUnit<B>(InMemory{strip + int64_t{u / B::kUnits} * (kStripRows * B::kBytes)},
                  u % B::kUnits, lane, w[s]);
    }
  };
  float sum[2] = {};
  const auto Use = [&](int first) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int u = first + s * kWarps;
      if (u >= units) break;
#pragma unroll
      for (int g = 0; g < Unit::kGroups; ++g) {
        const int64_t group =
            u / B::kUnits * (B::kElements / kQuantisedGroup) + B::Group(u % B::kUnits, g);
        const int2 x = PartOfGroup<B>(a.x.q + group * kQuantisedGroup, part);
        const float2 of_x = a.x.groups[group * a.x.stride];  // scale, total
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const Unit& row = w[s][r];
          const int low = __dp4a(row.words[g][0], x.x, 0);
          float value;
          if constexpr (Unit::kScales == 1) {
            value = row.scale[g][0] * static_cast<float>(__dp4a(row.words[g][1], x.y, low));
          } else {
            value = row.scale[g][0] * static_cast<float>(low) +
                    row.scale[g][1] * static_cast<float>(__dp4a(row.words[g][1], x.y, 0));
          }
          // A part has a quarter of the total's product.
          if constexpr (B::kMin) value = fmaf(row.min[g], -0.25f * of_x.y, value);
          sum[r] = fmaf(of_x.x, value, sum[r]);
        }
      }
    }
  };
  Load(warp);
  AwaitEarlier();
  for (int u = warp; u < units; u += kAhead * kWarps) {
    Use(u);
    Load(u + kAhead * kWarps);
  }

  __shared__ float sums[kWarps][kStripRows];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    if (part == 0) sums[warp][8 * r + lane / 4] = sum[r];
  }
  __syncthreads();
  const int column = blockIdx.x * kStripRows + threadIdx.x;
  if (threadIdx.x >= kStripRows || column >= a.columns) return;
  float all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) all += sums[w][threadIdx.x];
  a.out[column] = all;
}

// A block of threads multiplies kTall strips by up to 8 · kTiles rows of x, each of its warps every
// kWarps-th unit.
template <class B, int kTiles, int kTall>
__global__ void __launch_bounds__(kWarps* kWarp) DotBlocks(BlockArgs a) {
  using Unit = typename B::Unit;
  // Units whose loads are under way.
  constexpr int kAhead = (kTiles == 1 ? 8 : kTiles == 2 ? 4 : 2) / Unit::kGroups;
  constexpr int kRows = 8 * kTiles, kColumns = kStripRows * kTall;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int quad = lane / 4, part = lane % 4;  // a row of each 8, the share of its units
  const int column0 = blockIdx.x * kColumns, row0 = blockIdx.y * kRows;
  const int64_t blocks = a.in / B::kElements;
  const uint8_t* strips[kTall];
#pragma unroll
  for (int m = 0; m < kTall; ++m) {  // beyond the end the last strip again
    const int strip = min(column0 / kStripRows + m, (a.columns - 1) / kStripRows);
    strips[m] = a.strips + strip * blocks * (kStripRows * B::kBytes);
  }
  const int8_t* x[kTiles];
  const float2* x_groups[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    x[n] = a.x.q + int64_t{min(row0 + 8 * n + quad, a.rows - 1)} * a.in;
    x_groups[n] = a.x.groups + min(row0 + 8 * n, static_cast<int>(a.x.stride) - 8) + 2 * part;
  }
  const int units = static_cast<int>(blocks) * B::kUnits;
  float sum[kTall][kTiles][4] = {};
  Unit w[kAhead][kTall][2];
  const auto Load = [&](int first) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int u = first + s * kWarps;
      if (u >= units) break;
#pragma unroll
      for (int m = 0; m < kTall; ++m) {
        LoadUnit<B>(InMemory{strips[m] + int64_t{u / B::kUnits} * (kStripRows * B::kBytes)},
                    u % B::kUnits, lane, w[s][m]);
      }
    }
  };
  const auto Use = [&](int first) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int u = first + s * kWarps;
      if (u >= units) break;
#pragma unroll
      for (int g = 0; g < Unit::kGroups; ++g) {
        const int64_t group =
            u / B::kUnits * (B::kElements / kQuantisedGroup) + B::Group(u % B::kUnits, g);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const int2 bytes = PartOfGroup<B>(x[n] + group * kQuantisedGroup, part);
          // Of the product's columns this lane has two: scale and total of each.
          const float4 two = *reinterpret_cast<const float4*>(x_groups[n] + group * a.x.stride);
#pragma unroll
          for (int m = 0; m < kTall; ++m) {
            AddGroup<B>(w[s][m], g, bytes, two, sum[m][n]);
          }
        }
      }
    }
  };
  Load(warp);
  AwaitEarlier();
  for (int u = warp; u < units; u += kAhead * kWarps) {
    Use(u);
    Load(u + kAhead * kWarps);
  }

  // The warps' sums, in order.
  __shared__ float sums[kWarps][kRows][kColumns];
#pragma unroll
  for (int m = 0; m < kTall; ++m) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[warp][8 * n + 2 * part + i % 2][kStripRows * m + i / 2 * 8 + quad] = sum[m][n][i];
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * kColumns; i += kWarps * kWarp) {
    const int row = i / kColumns, column = i % kColumns;
    if (row0 + row >= a.rows || column0 + column >= a.columns) continue;
    float all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += sums[w][row][column];
    a.out[(row0 + row) * a.out_stride + column0 + column] = all;
  }
}

template <class B, int kTiles, int kTall>
void Launch(BackendContext& context, const BlockArgs& a) {
  const dim3 grid(Blocks(a.columns, kStripRows * kTall), Blocks(a.rows, 8 * kTiles));
  LaunchEarly(context, DotBlocks<B, kTiles, kTall>, grid, kWarps * kWarp, a);
}

}  // namespace

void QuantiseRows(BackendContext& context, const View& x, const QuantisedRows& rows) {
  CHECK_EQ(x.shape[1] % kQuantisedGroup, 0);
  const int64_t groups = x.shape[0] * (x.shape[1] / kQuantisedGroup);
  Quantise<<<Blocks(groups, kQuantiseWarps), kQuantiseWarps * kWarp, 0, context.stream>>>(
      x.as<float>(), x.stride[0], static_cast<int>(x.shape[1]), groups, rows);
}

void MultiplyBlocks(BackendContext& context, const Product& p, const QuantisedRows& rows) {
  BlockArgs a;
  a.strips = p.weight.as<const uint8_t>();
  a.x = rows;
  a.out = p.out.as<float>();
  a.out_stride = p.out.stride[0];
  a.rows = static_cast<int>(p.rows());
  a.in = static_cast<int>(p.in());
  a.columns = static_cast<int>(p.columns());
  CHECK(VisitBlocks(p.weight.dtype, [&](auto format) {
    using B = decltype(format);
    if (a.rows == 1 && !context.deterministic) {
      LaunchEarly(context, DotRow<B>, dim3(Blocks(a.columns, kStripRows)), kWarps * kWarp, a);
    } else if (a.rows <= 8) {
      Launch<B, 1, 1>(context, a);
    } else if (a.rows <= 16) {
      Launch<B, 2, 1>(context, a);
    } else {
      Launch<B, 4, 2>(context, a);
    }
  })) << Info(p.weight.dtype).name;
}

}  // namespace longspan::cuda
