#pragma once
// Carries vectors to a backend's memory and home again, for tests of single ops.
#include <gtest/gtest.h>

#include <vector>

#include "kernels/backend.h"

namespace longspan::testing {

// Vectors that an op works on, where its backend can reach them; ops change them by Home().
class Travel {
 public:
  explicit Travel(Backend& backend) : backend_(backend) {}

  template <class T>
  T* operator()(std::vector<T>& values) {
    if (backend_.host_memory()) return values.data();
    const size_t bytes = values.size() * sizeof(T);
    Buffer& there = buffers_.emplace_back(backend_.Allocate(bytes));
    backend_.CopyIn(there.data(), values.data(), bytes);
    homes_.push_back(values.data());
    return reinterpret_cast<T*>(there.data());
  }
  void Home() {
    for (size_t i = 0; i < homes_.size(); ++i) {
      backend_.CopyOut(homes_[i], buffers_[i].data(), buffers_[i].bytes());
    }
    ASSERT_EQ(backend_.Fault(), "");
  }

 private:
  Backend& backend_;
  std::vector<Buffer> buffers_;
  std::vector<void*> homes_;
};

}  // namespace longspan::testing
