// Makes absl::Mutex and absl::Notification visible to ThreadSanitizer. Debian's abseil is built
// without it, so that every value which one of them guards would be reported as a race. These
// definitions come before the library's and call it: an unlock releases, a lock acquires. Linked
// only with LONGSPAN_SANITIZE=thread.
#include <dlfcn.h>

#include <string>

#include "absl/base/config.h"
#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "kernels/check.h"

extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);

// The library's own deadlock detector, guarded by a lock that is not shown here.
const char* __tsan_default_suppressions() {
  return "called_from_lib:libabsl_graphcycles_internal\n";
}
}

namespace {

#define LONGSPAN_STRING_(x) #x
#define LONGSPAN_STRING(x) LONGSPAN_STRING_(x)

// The library's function; `rest` is its mangled name below abseil's inline namespace.
template <class Function>
Function Real(const char* constness, const char* rest) {
  const std::string space = LONGSPAN_STRING(ABSL_OPTION_INLINE_NAMESPACE_NAME);
  const std::string name =
      std::string("_ZN") + constness + "4absl" + std::to_string(space.size()) + space + rest;
  void* symbol = dlsym(RTLD_NEXT, name.c_str());
  CHECK(symbol != nullptr) << name;
  return reinterpret_cast<Function>(symbol);
}

// Conditions of waiting threads are evaluated by whoever unlocks, under the lock but after the
// release that ThreadSanitizer was told of.
struct IgnoreReads {
  IgnoreReads() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); }
  ~IgnoreReads() { AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

}  // namespace

namespace absl {
ABSL_NAMESPACE_BEGIN

void Mutex::Lock() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  static const auto real = Real<void (*)(Mutex*)>("", "5Mutex4LockEv");
  {
    IgnoreReads ignore;
    real(this);
  }
  __tsan_acquire(this);
}

void Mutex::Unlock() ABSL_NO_THREAD_SAFETY_ANALYSIS {
  static const auto real = Real<void (*)(Mutex*)>("", "5Mutex6UnlockEv");
  __tsan_release(this);
  IgnoreReads ignore;
  real(this);
}

void Mutex::LockWhen(const Condition& condition) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  static const auto real =
      Real<void (*)(Mutex*, const Condition*)>("", "5Mutex8LockWhenERKNS0_9ConditionE");
  {
    IgnoreReads ignore;
    real(this, &condition);
  }
  __tsan_acquire(this);
}

void Mutex::Await(const Condition& condition) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  static const auto real =
      Real<void (*)(Mutex*, const Condition*)>("", "5Mutex5AwaitERKNS0_9ConditionE");
  __tsan_release(this);
  {
    IgnoreReads ignore;
    real(this, &condition);
  }
  __tsan_acquire(this);
}

bool Mutex::AwaitWithTimeout(const Condition& condition,
                             Duration timeout) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  static const auto real = Real<bool (*)(Mutex*, const Condition*, Duration)>(
      "", "5Mutex16AwaitWithTimeoutERKNS0_9ConditionENS0_8DurationE");
  __tsan_release(this);
  bool met;
  {
    IgnoreReads ignore;
    met = real(this, &condition, timeout);
  }
  __tsan_acquire(this);
  return met;
}

void Notification::Notify() {
  static const auto real = Real<void (*)(Notification*)>("", "12Notification6NotifyEv");
  __tsan_release(this);
  real(this);
}

void Notification::WaitForNotification() const {
  static const auto real =
      Real<void (*)(const Notification*)>("K", "12Notification19WaitForNotificationEv");
  real(this);
  __tsan_acquire(const_cast<Notification*>(this));
}

ABSL_NAMESPACE_END
}  // namespace absl
