#pragma once
// A fixed team of threads for data-parallel loops. Thread-compatible: one thread calls Run at a time and
// takes part as thread 0. Between loops workers spin for a bounded time, then sleep.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace longspan {

class ThreadTeam {
 public:
  explicit ThreadTeam(int threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(thread) once on each thread of the team and returns when all have returned.
  void Run(const std::function<void(int thread)>& body);
  // Splits [0, count) into chunks of `grain` taken in any order: body(begin, end, thread).
  void For(int64_t count, int64_t grain,
           const std::function<void(int64_t begin, int64_t end, int thread)>& body);

 private:
  void Work(int thread);

  std::vector<std::thread> workers_;
  const std::function<void(int)>* body_ = nullptr;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  int sleepers_ = 0;
};

}  // namespace longspan
