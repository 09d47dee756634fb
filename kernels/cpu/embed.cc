// Embedding rows of any weight type.
#include "kernels/check.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/ops_cpu.h"
#include "kernels/cpu/panels.h"

namespace longspan::cpu {
namespace {

constexpr int64_t kGrain = 4;  // rows

}  // namespace

void Embed(BackendContext& context, const EmbedArgs& args) {
  const int64_t rows = args.tokens.shape[0];
  const int64_t dim = args.table.shape[1];
  CHECK(args.tokens.dtype == DType::kI32 && args.out.dtype == DType::kF32);
  CHECK_EQ(args.out.shape[0], rows);
  CHECK_EQ(args.out.shape[1], dim);
  context.team.For(rows, kGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t token = args.tokens.as<int32_t>()[i];
      CHECK(token >= 0 && token < args.table.shape[0])
          << "token " << token << " of a vocabulary of " << args.table.shape[0];
      float* out = reinterpret_cast<float*>(args.out.row(i));
      if (args.table.packed) {
        DequantisePackedRow(args.table, token, out);
      } else {
        DequantiseRow(args.table.dtype, args.table.row(token), dim, out);
      }
      for (int64_t d = 0; d < dim; ++d) out[d] *= args.scale;
    }
  });
}

}  // namespace longspan::cpu
