#include "kernels/backend.h"

namespace longspan {

double Roofline::OperationsPerSecond(OpId op, const std::string& kind) const {
  if (op != OpId::kMatMul && op != OpId::kGatedMatMul) return operations_per_second;
  const auto product = product_operations_per_second.find(kind.substr(0, kind.find(' ')));
  return product == product_operations_per_second.end() ? operations_per_second : product->second;
}

void Backend::Account(OpId op, Work work, std::chrono::nanoseconds time) {
  OpTotals& t = profile_[static_cast<int>(op)];
  t.calls.fetch_add(1, std::memory_order_relaxed);
  t.nanoseconds.fetch_add(time.count(), std::memory_order_relaxed);
  t.bytes.fetch_add(work.bytes, std::memory_order_relaxed);
  t.flops.fetch_add(work.flops, std::memory_order_relaxed);
}

void Backend::AccountTimed(const TimedCall& call, std::chrono::nanoseconds time) {
  Account(call.op, call.work, time);
  const std::lock_guard<std::mutex> lock(timed_mutex_);
  timed_[{call.op, call.kind}] += {1, time.count(), call.work.bytes, call.work.flops};
}

void Backend::TimeOps(bool on) {
  if (on && !timing_) {
    const std::lock_guard<std::mutex> lock(timed_mutex_);
    timed_.clear();
  }
  timing_ = on;
}

OpCounts Backend::TimedOps() const {
  const std::lock_guard<std::mutex> lock(timed_mutex_);
  return timed_;
}

}  // namespace longspan
