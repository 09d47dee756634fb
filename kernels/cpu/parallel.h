#pragma once
// A fixed team of threads for data-parallel loops. Thread-compatible: one thread calls Run at a
// time and takes part as thread 0. Between loops workers spin for a bounded time, then sleep.
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace longspan {

template <class Signature>
class FunctionRef;

// A look at a callable that outlives the call: std::function without the allocation.
template <class... Args>
class FunctionRef<void(Args...)> {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(const F& callable)  // implicit, as lambdas are passed
      : callable_(&callable),
        call_([](const void* c, Args... args) { (*static_cast<const F*>(c))(args...); }) {}

  void operator()(Args... args) const { call_(callable_, args...); }

 private:
  const void* callable_;
  void (*call_)(const void*, Args...);
};

class ThreadTeam {
 public:
  explicit ThreadTeam(int threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(thread) once on each thread of the team and returns when all have returned.
  void Run(FunctionRef<void(int thread)> body);
  // Splits [0, count) into chunks of `grain`: body(begin, end, thread). A thread takes those of its
  // own part of the range in ascending order, then what others have left.
  void For(int64_t count, int64_t grain,
           FunctionRef<void(int64_t begin, int64_t end, int thread)> body);

 private:
  void Work(int thread);
  void AwaitLoop(uint32_t seen);  // until generation_ leaves `seen`
  void AwaitWorkers();            // until running_ is 0

  // Chunks of one loop that a thread begins with; others take of them, too.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  std::vector<std::thread> workers_;
  std::vector<Share> shares_;                     // [threads]
  const FunctionRef<void(int)>* body_ = nullptr;  // published by generation_
  int caller_processor_ = 0;                      // with it
  // Whether workers leave the processor that the caller runs on. Where two threads wake each other,
  // Linux may keep them on one of two processors for seconds, ten times as slow.
  bool spread_ = false;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> running_{0};  // workers that have not yet returned from the loop
  std::atomic<bool> stop_{false};

  // For those who stop spinning. A sleeper counts itself, then looks again; a waker changes the
  // state, then looks at the count: in sequentially consistent order one of them sees the other.
  std::atomic<int> sleepers_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
};

}  // namespace longspan
