#include "kernels/cpu/parallel.h"

#include <sched.h>

#include <algorithm>

#include "kernels/check.h"

namespace longspan {
namespace {

// About 50 µs: longer than the gap between two ops of a step, far shorter than a scheduler's slice.
constexpr int kSpins = 1500;

// The processors that this thread may run on; none where the kernel does not tell.
cpu_set_t AllowedProcessors() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) CPU_ZERO(&allowed);
  return allowed;
}

// Goes to another processor, any that the thread may run on.
void Leave(int processor) {
  const cpu_set_t allowed = AllowedProcessors();
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  if (CPU_COUNT(&others) == 0) return;
  sched_setaffinity(0, sizeof(others), &others);  // does not return on that processor
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // its "yield" instruction does nothing on most processors
#else
  std::this_thread::yield();
#endif
}

}  // namespace

ThreadTeam::ThreadTeam(int threads) : shares_(threads) {
  CHECK_GE(threads, 1);
  const cpu_set_t allowed = AllowedProcessors();
  spread_ = CPU_COUNT(&allowed) >= threads;
  workers_.reserve(threads - 1);
  for (int thread = 1; thread < threads; ++thread) {
    workers_.emplace_back([this, thread] { Work(thread); });
  }
}

ThreadTeam::~ThreadTeam() {
  stop_ = true;
  ++generation_;
  { std::lock_guard lock(mutex_); }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadTeam::Run(FunctionRef<void(int)> body) {
  if (!workers_.empty()) {
    body_ = &body;
    caller_processor_ = sched_getcpu();
    running_ = static_cast<int>(workers_.size());
    ++generation_;
    if (sleepers_ > 0) {
      { std::lock_guard lock(mutex_); }
      wake_.notify_all();
    }
  }
  body(0);
  if (!workers_.empty()) AwaitWorkers();
}

void ThreadTeam::For(int64_t count, int64_t grain, FunctionRef<void(int64_t, int64_t, int)> body) {
  CHECK_GE(grain, 1);
  if (count <= grain) {
    if (count > 0) body(0, count, 0);
    return;
  }
  const int64_t chunks = (count + grain - 1) / grain;
  for (int t = 0; t < threads(); ++t) {
    shares_[t].next = chunks * t / threads();
    shares_[t].end = chunks * (t + 1) / threads();
  }
  const auto take = [&](int thread) {
    for (int i = 0; i < threads(); ++i) {
      Share& share = shares_[(thread + i) % threads()];
      while (true) {
        const int64_t chunk = share.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= share.end) break;
        body(chunk * grain, std::min((chunk + 1) * grain, count), thread);
      }
    }
  };
  Run(take);
}

void ThreadTeam::Work(int thread) {
  uint32_t seen = 0;
  while (true) {
    AwaitLoop(seen);
    ++seen;
    if (stop_) return;
    if (spread_ && sched_getcpu() == caller_processor_) Leave(caller_processor_);
    (*body_)(thread);
    if (--running_ == 0 && caller_sleeps_) {
      { std::lock_guard lock(mutex_); }
      done_.notify_one();
    }
  }
}

void ThreadTeam::AwaitLoop(uint32_t seen) {
  for (int i = 0; i < kSpins; ++i) {
    if (generation_.load(std::memory_order_acquire) != seen) return;
    Pause();
  }
  std::unique_lock lock(mutex_);
  ++sleepers_;
  wake_.wait(lock, [&] { return generation_ != seen; });
  --sleepers_;
}

void ThreadTeam::AwaitWorkers() {
  for (int i = 0; i < kSpins; ++i) {
    if (running_.load(std::memory_order_acquire) == 0) return;
    Pause();
  }
  std::unique_lock lock(mutex_);
  // Not a plain store: qemu 7.2 lets the load of running_ pass one, and both sides then sleep.
  caller_sleeps_.exchange(true);
  done_.wait(lock, [&] { return running_ == 0; });
  caller_sleeps_ = false;
}

}  // namespace longspan
