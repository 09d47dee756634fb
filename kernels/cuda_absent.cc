// Stands in for kernels/cuda in builds without CUDA.
#include "kernels/backend.h"

namespace longspan {

std::unique_ptr<Backend> Backend::Cuda(const CudaOptions&, std::string* why) {
  *why = "this build has no CUDA backend: configure with -DLONGSPAN_CUDA=ON";
  return nullptr;
}

}  // namespace longspan
