// Softmax attention over paged and ring caches.
#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {

void Attention(BackendContext& context, const AttentionArgs&) {
  Ok(context, cudaErrorNotSupported, "Attention");
}

}  // namespace longspan::cuda
