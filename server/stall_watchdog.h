#pragma once
// Cuts off streams whose reader has stopped: a write that does not complete within the timeout
// fires the stream's callback once. One thread for all streams.
#include <cstdint>
#include <functional>
#include <map>
#include <thread>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace longspan {

class StallWatchdog {
 public:
  explicit StallWatchdog(absl::Duration timeout);
  ~StallWatchdog();

  // `on_stall` runs on the watchdog's thread, under its lock: it must not call the watchdog, nor
  // take a lock that is held around a call of it. The id is never 0.
  uint64_t Add(std::function<void()> on_stall);
  void WriteBegan(uint64_t id);
  void WriteEnded(uint64_t id);
  void Remove(uint64_t id);  // on return on_stall is not running and will not run
  absl::Duration timeout() const { return timeout_; }

 private:
  struct Stream {
    std::function<void()> on_stall;
    absl::Time writing_since = absl::InfiniteFuture();
  };
  void Loop();

  const absl::Duration timeout_;
  absl::Mutex mu_;
  std::map<uint64_t, Stream> streams_ ABSL_GUARDED_BY(mu_);
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace longspan
