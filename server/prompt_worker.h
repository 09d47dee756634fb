#pragma once
// A thread for long prompts. Tokenizing megabytes takes seconds and about 100 bytes of memory for
// each of theirs; on gRPC's own threads, which are few, it would stop every other call, health
// checks among them. One at a time bounds the memory.
#include <cstddef>
#include <deque>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace longspan {

class PromptWorker {
 public:
  // A message of more bytes is worth the way to another thread; tokenizing one of so many takes
  // some 30 ms.
  static constexpr size_t kLongBytes = 32 << 10;

  PromptWorker();
  ~PromptWorker();  // runs what was given

  // Runs `job` of a message of so many bytes: at once, or if they are many on the thread, in order.
  void Run(size_t bytes, std::function<void()> job);

 private:
  void Loop();
  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stop_ || !jobs_.empty(); }

  absl::Mutex mu_;
  std::deque<std::function<void()>> jobs_ ABSL_GUARDED_BY(mu_);
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  std::thread thread_;
};

}  // namespace longspan
