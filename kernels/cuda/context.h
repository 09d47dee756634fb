#pragma once
// What the CUDA ops need from their backend. Made once by Backend::Cuda(); one thread uses it.
#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <string>

#include "kernels/check.h"
#include "kernels/ops.h"

namespace longspan::cuda {

struct TilePlans;
struct LateSpans;

struct BackendContext : longspan::BackendContext {
  cudaStream_t stream = nullptr;  // every op's kernels, in call order
  int device = 0;
  int compute_capability = 0;  // of the device and of the code that it runs: 90 for sm_90
  int sm_count = 0;
  int whole_clusters = 0;  // that run at once, of blocks which take a multiprocessor; 0: not known
  size_t l2_bytes = 0;
  int max_shared_bytes = 0;    // of one block, opted in
  bool deterministic = false;  // CudaOptions::deterministic
  cublasLtHandle_t cublas = nullptr;

  // Scratch memory for the op that asks, 256-byte aligned, from one allocation made at start. What
  // the op's kernels find there is undefined and what they leave is lost: the next op gets the same
  // memory, behind them in the stream. One call per op. An op asks for at most kWorkspaceBytes: it
  // bounds its need by working in pieces.
  static constexpr size_t kWorkspaceBytes = size_t{256} << 20;
  void* Workspace(size_t bytes) {
    CHECK_LE(bytes, kWorkspaceBytes);
    return workspace;
  }
  void* workspace = nullptr;

  TilePlans* tile_plans = nullptr;  // owned; kernels/cuda/matmul.h
  LateSpans* late_spans = nullptr;  // owned; kernels/cuda/late_spans.h

  // Ops are issued for their costs alone: the graph that is launched next holds their kernels.
  bool replaying = false;

  // The first error that the device or its driver reported, "" before that. Sticky: no op runs
  // after it, and whoever issued ops must look at it before trusting what it reads back.
  std::string fault;
};

}  // namespace longspan::cuda
