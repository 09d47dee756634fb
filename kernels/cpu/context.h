#pragma once
// What the CPU ops need from their backend: a thread team, and scratch memory per thread that lives
// as long as the backend, so that a steady step allocates nothing.
#include <cstddef>
#include <memory>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"
#include "kernels/ops.h"

namespace longspan::cpu {

struct BackendContext : longspan::BackendContext {
  BackendContext(int threads, Simd simd) : team(threads), simd(simd), scratch_(threads) {}

  // At least `bytes` of 64-byte-aligned memory for thread `thread`; contents are undefined and the
  // pointer holds until that thread's next call.
  std::byte* Scratch(int thread, size_t bytes);
  // Gives every thread as much as the one that has most, so that it does not matter later which
  // thread does what. Call it from the thread that issues ops, between ops.
  void LevelScratch();
  // The same as Scratch(), one area shared by all threads, for what they prepare together
  // (quantised activations). Call it from the thread that issues the op, before the team runs.
  std::byte* SharedScratch(size_t bytes);

  ThreadTeam team;
  const Simd simd;

 private:
  struct Area {
    std::unique_ptr<std::byte[]> memory;
    std::byte* aligned = nullptr;
    size_t bytes = 0;
  };
  static std::byte* Grow(Area& area, size_t bytes);
  static void Allocate(Area& area, size_t bytes);

  std::vector<Area> scratch_;
  Area shared_;
};

}  // namespace longspan::cpu
