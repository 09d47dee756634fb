// Activations to the cache's element type.
#include <algorithm>

#include "kernels/check.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/ops_cpu.h"

namespace longspan::cpu {
namespace {

constexpr int64_t kGrainElements = 16384;

template <class To, To (*kConvert)(float)>
void ConvertRow(const float* x, int64_t n, std::byte* out) {
  To* to = reinterpret_cast<To*>(out);
  for (int64_t i = 0; i < n; ++i) to[i] = kConvert(x[i]);
}

float Same(float value) { return value; }

using RowFunction = void (*)(const float*, int64_t, std::byte*);

RowFunction Choose(DType to) {
  switch (to) {
    case DType::kF32:
      return ConvertRow<float, Same>;
    case DType::kF16:
      return ConvertRow<uint16_t, FloatToHalf>;
    case DType::kBF16:
      return ConvertRow<uint16_t, FloatToBrain>;
    default:
      return nullptr;
  }
}

// Where innermost row `index` of a view begins; dimensions before the last may be strided.
std::byte* InnerRow(const View& view, int64_t index) {
  int64_t offset = 0;
  for (int d = view.rank - 2; d >= 0; --d) {
    offset += index % view.shape[d] * view.stride[d];
    index /= view.shape[d];
  }
  return static_cast<std::byte*>(view.data) + BytesOf(view.dtype, offset);
}

}  // namespace

void Convert(BackendContext& context, const ConvertArgs& args) {
  const RowFunction convert = Choose(args.out.dtype);
  CHECK(convert != nullptr && args.x.dtype == DType::kF32)
      << Info(args.x.dtype).name << " to " << Info(args.out.dtype).name;
  CHECK_EQ(args.x.rank, args.out.rank);
  for (int d = 0; d < args.x.rank; ++d) CHECK_EQ(args.x.shape[d], args.out.shape[d]);
  if (args.x.elements() == 0) return;
  const int64_t dim = args.x.shape[args.x.rank - 1];
  const int64_t grain = std::max<int64_t>(1, kGrainElements / dim);
  context.team.For(args.x.elements() / dim, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      convert(reinterpret_cast<const float*>(InnerRow(args.x, i)), dim, InnerRow(args.out, i));
    }
  });
}

}  // namespace longspan::cpu
