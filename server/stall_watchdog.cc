#include "server/stall_watchdog.h"

#include <algorithm>

#include "absl/time/clock.h"

namespace longspan {

StallWatchdog::StallWatchdog(absl::Duration timeout)
    : timeout_(timeout), thread_([this] { Loop(); }) {}

StallWatchdog::~StallWatchdog() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
}

uint64_t StallWatchdog::Add(std::function<void()> on_stall) {
  absl::MutexLock lock(&mu_);
  streams_[next_].on_stall = std::move(on_stall);
  return next_++;
}

void StallWatchdog::WriteBegan(uint64_t id) {
  const absl::Time now = absl::Now();
  absl::MutexLock lock(&mu_);
  if (auto it = streams_.find(id); it != streams_.end()) it->second.writing_since = now;
}

void StallWatchdog::WriteEnded(uint64_t id) {
  absl::MutexLock lock(&mu_);
  if (auto it = streams_.find(id); it != streams_.end()) {
    it->second.writing_since = absl::InfiniteFuture();
  }
}

void StallWatchdog::Remove(uint64_t id) {
  absl::MutexLock lock(&mu_);
  streams_.erase(id);
}

void StallWatchdog::Loop() {
  const absl::Duration pause = std::clamp(timeout_ / 4, absl::Milliseconds(10), absl::Seconds(1));
  absl::MutexLock lock(&mu_);
  while (!mu_.AwaitWithTimeout(absl::Condition(&stop_), pause)) {
    const absl::Time limit = absl::Now() - timeout_;
    for (auto& [id, stream] : streams_) {
      if (stream.writing_since > limit) continue;
      stream.writing_since = absl::InfiniteFuture();
      stream.on_stall();
    }
  }
}

}  // namespace longspan
