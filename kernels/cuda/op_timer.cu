#include "kernels/cuda/op_timer.h"

#include "kernels/cuda/check_cuda.h"

namespace longspan::cuda {
namespace {

constexpr size_t kPairs = 4096;  // a step has some hundreds of ops

}  // namespace

OpTimer::OpTimer(BackendContext& context) : context_(context), events_(kPairs) {
  for (auto& [begin, end] : events_) {
    Ok(context, cudaEventCreate(&begin), "creating an event");
    Ok(context, cudaEventCreate(&end), "creating an event");
  }
}

OpTimer::~OpTimer() {
  for (auto& [begin, end] : events_) {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
}

void OpTimer::Begin() {
  CHECK(!full());
  if (!context_.fault.empty()) return;
  Ok(context_, cudaEventRecord(events_[ended_].first, context_.stream), "timing an op");
}

void OpTimer::End() {
  if (!context_.fault.empty()) return;
  Ok(context_, cudaEventRecord(events_[ended_].second, context_.stream), "timing an op");
  ++ended_;
}

std::vector<std::chrono::nanoseconds> OpTimer::Collect() {
  std::vector<std::chrono::nanoseconds> times;
  if (ended_ > 0 && context_.fault.empty()) {
    Ok(context_, cudaEventSynchronize(events_[ended_ - 1].second), "a kernel");
  }
  for (size_t i = 0; i < ended_ && context_.fault.empty(); ++i) {
    float milliseconds = 0;
    Ok(context_, cudaEventElapsedTime(&milliseconds, events_[i].first, events_[i].second),
       "timing an op");
    times.emplace_back(static_cast<int64_t>(milliseconds * 1e6));
  }
  ended_ = 0;
  return context_.fault.empty() ? times : std::vector<std::chrono::nanoseconds>();
}

}  // namespace longspan::cuda
