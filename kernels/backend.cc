#include "kernels/backend.h"

namespace longspan {

void Backend::Account(OpId op, Work work, std::chrono::nanoseconds time) {
  OpTotals& t = profile_[static_cast<int>(op)];
  t.calls.fetch_add(1, std::memory_order_relaxed);
  t.nanoseconds.fetch_add(time.count(), std::memory_order_relaxed);
  t.bytes.fetch_add(work.bytes, std::memory_order_relaxed);
  t.flops.fetch_add(work.flops, std::memory_order_relaxed);
}

}  // namespace longspan
