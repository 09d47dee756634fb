#include "kernels/cpu/context.h"

#include <algorithm>
#include <cstdint>

namespace longspan::cpu {
namespace {

constexpr size_t kAlignment = 64;

}  // namespace

std::byte* BackendContext::Scratch(int thread, size_t bytes) {
  return Grow(scratch_[thread], bytes);
}

std::byte* BackendContext::SharedScratch(size_t bytes) { return Grow(shared_, bytes); }

std::byte* BackendContext::Grow(Area& area, size_t bytes) {
  if (bytes <= area.bytes && area.memory != nullptr) return area.aligned;
  // At least doubling, so that slowly growing requests settle after a few.
  const size_t capacity = std::max({bytes, 2 * area.bytes, size_t{4096}});
  area.memory.reset();
  area.memory.reset(new std::byte[capacity + kAlignment]);
  const auto address = reinterpret_cast<uintptr_t>(area.memory.get());
  area.aligned = area.memory.get() + (kAlignment - address % kAlignment) % kAlignment;
  area.bytes = capacity;
  return area.aligned;
}

}  // namespace longspan::cpu
