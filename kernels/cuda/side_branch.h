#pragma once
// A branch of the graph that is being captured, beside its main line: for kernels whose results no
// other op of the graph takes, so that none waits for them.
#include <cuda_runtime.h>

#include <cstddef>

namespace longspan::cuda {

// Used by the backend's thread. The first error of any call is kept: see error().
class SideBranch {
 public:
  static constexpr size_t kBytes = size_t{256} << 20;  // of memory, from the first Prepare() on

  SideBranch() = default;
  SideBranch(const SideBranch&) = delete;
  SideBranch& operator=(const SideBranch&) = delete;
  ~SideBranch() {
    cudaFree(memory_);
    if (forked_ != nullptr) cudaEventDestroy(forked_);
    if (joined_ != nullptr) cudaEventDestroy(joined_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  // Outside of captures, by who would like a branch in a later one. Without memory there is none.
  void Prepare() {
    if (tried_ || open_) return;
    tried_ = true;
    if (cudaMalloc(&memory_, kBytes) != cudaSuccess) {
      cudaGetLastError();  // out of memory is an answer, not a fault
      memory_ = nullptr;
      return;
    }
    Keep(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    Keep(cudaEventCreateWithFlags(&forked_, cudaEventDisableTiming));
    Keep(cudaEventCreateWithFlags(&joined_, cudaEventDisableTiming));
  }

  // Around a capture of `main`.
  void Open() { open_ = memory_ != nullptr, used_ = 0; }
  void Close(cudaStream_t main) {
    if (open_ && used_ > 0) {
      Keep(cudaEventRecord(joined_, stream_));
      Keep(cudaStreamWaitEvent(main, joined_));
    }
    open_ = false;
  }

  // 256-byte aligned memory that is the caller's until the graph ends. nullptr: no branch, or no
  // more memory. Who gets it forks.
  void* Take(size_t bytes) {
    bytes = (bytes + 255) / 256 * 256;
    if (!open_ || bytes > kBytes - used_) return nullptr;
    used_ += bytes;
    return static_cast<std::byte*>(memory_) + (used_ - bytes);
  }
  // Where kernels run behind all that was issued on `main` so far.
  cudaStream_t Fork(cudaStream_t main) {
    Keep(cudaEventRecord(forked_, main));
    Keep(cudaStreamWaitEvent(stream_, forked_));
    return stream_;
  }

  cudaError_t error() const { return error_; }

 private:
  void Keep(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  void* memory_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t forked_ = nullptr, joined_ = nullptr;
  size_t used_ = 0;
  bool tried_ = false, open_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace longspan::cuda
