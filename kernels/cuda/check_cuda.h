#pragma once
// Errors of the device and its driver. They are the world's, not ours: the first one becomes the
// context's sticky fault, which Backend::Fault() shows to the engine.
#include <cublasLt.h>
#include <cuda_runtime.h>

#include "kernels/cuda/context.h"

namespace longspan::cuda {

// True if `error` is none; else records it with `what` unless an earlier fault is known.
bool Ok(BackendContext& context, cudaError_t error, const char* what);
bool Ok(BackendContext& context, cublasStatus_t status, const char* what);

// Call after the launches of an op: records a launch that failed (its grid, its shared memory).
inline void CheckLaunch(BackendContext& context, const char* op) {
  Ok(context, cudaGetLastError(), op);
}

}  // namespace longspan::cuda
