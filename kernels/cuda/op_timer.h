#pragma once
// How long the device takes for each op: an event before its kernels and one behind them, read many
// ops later, so that the host waits for no single op.
#include <cuda_runtime.h>

#include <chrono>
#include <cstddef>
#include <utility>
#include <vector>

#include "kernels/cuda/context.h"

namespace longspan::cuda {

// Used by the thread that issues ops.
class OpTimer {
 public:
  explicit OpTimer(BackendContext& context);
  ~OpTimer();
  OpTimer(const OpTimer&) = delete;
  OpTimer& operator=(const OpTimer&) = delete;

  void Begin();  // of an op; not while full()
  void End();    // of the op that began last
  bool full() const { return ended_ == events_.size(); }
  // The times of the ops that ended since the last call, in their order; waits for them. Empty once
  // the device has faulted.
  std::vector<std::chrono::nanoseconds> Collect();

 private:
  BackendContext& context_;
  std::vector<std::pair<cudaEvent_t, cudaEvent_t>> events_;  // begin and end
  size_t ended_ = 0;
};

}  // namespace longspan::cuda
