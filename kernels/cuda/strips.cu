// Block weights from a file's order to strips (blocks.cuh), and from strips to bf16.
#include "kernels/cuda/blocks.cuh"
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/matmul.h"
#include "kernels/cuda/numbers.cuh"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 256;

// A thread moves two bytes: no field of a block is narrower, and none begins at an odd one.
template <class B>
__global__ void Pack(const uint8_t* rows, int64_t count, int64_t blocks, int64_t pairs,
                     uint8_t* strips) {
  constexpr int kPairs = B::kBytes / 2;
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i >= pairs) return;
  const int byte = static_cast<int>(i % kPairs) * 2,
            in_strip = static_cast<int>(i / kPairs) % kStripRows;
  const int64_t place = i / (kPairs * kStripRows);  // strip by strip, along the rows
  const int64_t row = place / blocks * kStripRows + in_strip;
  const uint8_t* from = rows + (row * blocks + place % blocks) * B::kBytes + byte;
  uint8_t* to = strips + place * kStripRows * B::kBytes + B::At(in_strip, byte);
  *reinterpret_cast<uint16_t*>(to) =
      row < count ? *reinterpret_cast<const uint16_t*>(from) : uint16_t{0};
}

// A warp takes a unit of a strip.
template <class B>
__global__ void Unpack(const uint8_t* strips, int64_t rows, int64_t in, int64_t units,
                       __nv_bfloat16* out) {
  using Unit = typename B::Unit;
  const int64_t index = (blockIdx.x * int64_t{kThreads} + threadIdx.x) / kWarp;
  if (index >= units) return;
  const int lane = threadIdx.x % kWarp, unit = static_cast<int>(index % B::kUnits);
  const int64_t place = index / B::kUnits, blocks = in / B::kElements;
  Unit of[2];
  LoadUnit<B>(InMemory{strips + place * kStripRows * B::kBytes}, unit, lane, of);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = place / blocks * kStripRows + lane / 4 + 8 * r;
    if (row >= rows) continue;
#pragma unroll
    for (int g = 0; g < Unit::kGroups; ++g) {
      __nv_bfloat16* group =
          out + row * in + place % blocks * B::kElements + 32 * B::Group(unit, g);
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        const float scale = of[r].scale[g][Unit::kScales == 2 ? w : 0];
        Floats<4> four;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const auto level = static_cast<int8_t>(of[r].words[g][w] >> 8 * i & 255);
          four.at[i] = scale * static_cast<float>(level) - of[r].min[g];
        }
        Store(four, group + WordAt<B>(lane % 4, w));
      }
    }
  }
}

}  // namespace

int64_t StripBytes(DType type, int64_t rows, int64_t in) {
  return BytesOf(type, int64_t{Blocks(rows, kStripRows)} * kStripRows * in);
}

void PackStrips(BackendContext& context, const View& rows, void* strips) {
  const int64_t bytes = StripBytes(rows.dtype, rows.shape[0], rows.shape[1]);
  CHECK(VisitBlocks(rows.dtype, [&](auto format) {
    using B = decltype(format);
    Pack<B><<<Blocks(bytes / 2, kThreads), kThreads, 0, context.stream>>>(
        rows.as<const uint8_t>(), rows.shape[0], rows.shape[1] / B::kElements, bytes / 2,
        static_cast<uint8_t*>(strips));
  })) << Info(rows.dtype).name;
  CheckLaunch(context, "packing weights");
}

void UnpackStrips(BackendContext& context, const View& weight, void* out) {
  const int64_t rows = weight.shape[0], in = weight.shape[1];
  const int64_t strips = Blocks(rows, kStripRows);
  VisitBlocks(weight.dtype, [&](auto format) {
    using B = decltype(format);
    const int64_t units = strips * (in / B::kElements) * B::kUnits;
    Unpack<B><<<Blocks(units * kWarp, kThreads), kThreads, 0, context.stream>>>(
        weight.as<const uint8_t>(), rows, in, units, static_cast<__nv_bfloat16*>(out));
  });
}

}  // namespace longspan::cuda
