#pragma once
// One device: its op table, its memory, its profile. Thread-compatible: one thread at a time issues
// ops (the engine's), except Profile() and TimedOps(), which any thread may read.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kernels/ops.h"

namespace longspan {

// Owned memory of a backend, aligned to at least 256 bytes, zeroed. Move-only; data() is nullptr
// when there was no memory.
class Buffer {
 public:
  using Free = void (*)(void* data, size_t bytes);
  Buffer() = default;
  Buffer(void* data, size_t bytes, Free free) : data_(data), bytes_(bytes), free_(free) {}
  Buffer(Buffer&& o) noexcept { *this = std::move(o); }
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    std::swap(free_, o.free_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) free_(data_, bytes_);
  }
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Free free_ = nullptr;
};

// Totals of one op since the backend was opened. Written by the engine thread, read by any.
struct OpTotals {
  std::atomic<int64_t> calls{0}, nanoseconds{0}, bytes{0}, flops{0};
};

// The same of some calls, as they stood at one moment.
struct OpCount {
  int64_t calls = 0, nanoseconds = 0, bytes = 0, flops = 0;

  OpCount& operator+=(const OpCount& o) {
    calls += o.calls;
    nanoseconds += o.nanoseconds;
    bytes += o.bytes;
    flops += o.flops;
    return *this;
  }
  OpCount& operator-=(const OpCount& o) {
    calls -= o.calls;
    nanoseconds -= o.nanoseconds;
    bytes -= o.bytes;
    flops -= o.flops;
    return *this;
  }
};
// By op and KindOf() its arguments.
using OpCounts = std::map<std::pair<OpId, std::string>, OpCount>;

// The most that a device was seen to do: what ops' bytes and operations per second are held
// against.
struct Roofline {
  double bytes_per_second = 0;       // read from memory far larger than the caches
  double operations_per_second = 0;  // of the instruction that sums products in its ops
  // The same of MatMul and GatedMatMul, by the name of its weights' type, where that takes another
  // instruction.
  std::map<std::string, double> product_operations_per_second = {};

  // Of an op and KindOf() its arguments.
  double OperationsPerSecond(OpId op, const std::string& kind) const;
};

struct CpuOptions {
  int threads = 0;  // 0: one per core that the process may run on
  // A name of cpu/simd.h; "": the best this machine has of those that round no activation.
  // "avx512_bf16": products with BF16 weights round their x to BF16.
  std::string simd = "";
};

struct CudaOptions {
  int device = 0;
  // A row's result is the same to the bit whatever shares its step and however its sequence was cut
  // into steps, as it always is on the CPU. Slower: one form of each op serves any number of rows.
  bool deterministic = false;
};

class Backend {
 public:
  // A CPU backend; dies (CHECK) on an unknown simd name or one that the machine cannot run.
  static std::unique_ptr<Backend> Cpu(const CpuOptions& options);
  // The threads that CpuOptions::threads = 0 stands for.
  static int CpuThreads();
  // nullptr with *why set when there is no usable GPU or the build has no CUDA (cuda_absent.cc).
  // Its ops return before the device has done them, so that its profile's times are those of
  // issuing, except under TimeOps().
  static std::unique_ptr<Backend> Cuda(const CudaOptions& options, std::string* why);

  virtual ~Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  const std::string& name() const { return name_; }  // "cpu (avx2, 2 threads)"
  const OpTable& ops() const { return ops_; }
  bool host_memory() const { return host_memory_; }  // views may point at ordinary memory

  // The only call form. Adds the op's cost and time to the profile.
  template <class Args>
  void Run(const Op<Args>& op, const Args& args) {
    CHECK(op.function != nullptr) << OpName(op.id) << " is missing on " << name_;
    if (timing_) OpBegins();
    const auto begin = std::chrono::steady_clock::now();
    op.function(*context_, args);
    const std::chrono::nanoseconds time = std::chrono::steady_clock::now() - begin;
    if (timing_) {
      OpEnds(TimedCall{op.id, KindOf(args), Cost(args)}, time);
    } else {
      Account(op.id, Cost(args), time);
    }
  }

  // The type that MatMul of `product` takes x as, whatever type x has now: F32, or BF16 where it
  // would round an F32 x to that first, or I8 where it would quantise one. Then an op that makes x
  // may write it so at once, to the same memory and with the same strides in elements, and the
  // product is the same to the bit.
  virtual DType ProductInput([[maybe_unused]] const MatMulArgs& product) const {
    return DType::kF32;
  }

  // Calls `issue`, which runs ops and does nothing else. A device that can launches ops that were
  // issued before under the same key all at once instead. The key stands for all that the ops'
  // arguments are, but not for what lies in the backend's memory nor for the lengths that Work is
  // counted by.
  virtual void Repeat([[maybe_unused]] uint64_t key, const std::function<void()>& issue) {
    issue();
  }

  virtual Buffer Allocate(size_t bytes) = 0;
  // Memory that Allocate() can still give; -1: as much as the machine has.
  virtual int64_t FreeBytes() const { return -1; }
  // The first error that the device reported, "" if none. After one, no op or copy does anything,
  // and what was read back since the last look is not to be trusted.
  virtual std::string Fault() const { return ""; }

  // Copies take effect in the order of calls, ops among them. Host to device; `from` may change
  // when the call returns.
  virtual void CopyIn(void* to, const void* from, size_t bytes) = 0;
  virtual void CopyOut(void* to, const void* from,
                       size_t bytes) = 0;  // device to host, complete on return
  // As CopyOut(), but complete only when FinishCopyOut() or the next CopyOutLater() returns; `to`
  // lives until then. What is issued meanwhile may change what lies at `from`.
  virtual void CopyOutLater(void* to, const void* from, size_t bytes) { CopyOut(to, from, bytes); }
  virtual void FinishCopyOut() {}
  virtual void CopyWithin(void* to, const void* from, size_t bytes) = 0;

  // Bytes of this backend's memory that a weight matrix takes in the form that its ops read; 0:
  // they read it where it lies.
  virtual int64_t WeightBytes(const View& matrix) const {
    return host_memory_ ? 0 : matrix.bytes();
  }
  // Copies the matrix to `to`, in that form, which the returned view says.
  virtual View PlaceWeights(const View& matrix, std::byte* to) {
    CopyIn(to, matrix.data, matrix.bytes());
    View placed = matrix;
    placed.data = to;
    return placed;
  }

  // Measures it, with ops idle; takes about a second.
  virtual Roofline MeasureRoofline() = 0;

  const OpTotals& Profile(OpId op) const { return profile_[static_cast<int>(op)]; }

  // While on, an op's time is what its work takes on the device, on every backend, and Repeat()
  // does no more than issue. A call counts when its time is known, at the latest when a CopyOut()
  // after it returns or this is turned off. Steps are slower meanwhile: time nothing else then.
  // To be called with ops idle; off at first.
  virtual void TimeOps(bool on);
  // The calls since TimeOps() was last turned on, told apart by kind.
  OpCounts TimedOps() const;

 protected:
  struct TimedCall {
    OpId op;
    std::string kind;
    Work work;
  };
  Backend(std::string name, BackendContext* context, OpTable ops, bool host_memory)
      : name_(std::move(name)), context_(context), ops_(ops), host_memory_(host_memory) {}
  bool timing() const { return timing_; }
  // Run() calls them around an op while timing(). `issued`: how long the op's function took.
  virtual void OpBegins() {}
  virtual void OpEnds(const TimedCall& call, std::chrono::nanoseconds issued) {
    AccountTimed(call, issued);
  }
  void AccountTimed(const TimedCall& call, std::chrono::nanoseconds time);

 private:
  void Account(OpId op, Work work, std::chrono::nanoseconds time);

  std::string name_;
  BackendContext* context_;
  OpTable ops_;
  bool host_memory_;
  OpTotals profile_[kOpCount];
  bool timing_ = false;
  mutable std::mutex timed_mutex_;
  OpCounts timed_;  // guarded by timed_mutex_
};

}  // namespace longspan
