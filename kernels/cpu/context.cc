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

void BackendContext::LevelScratch() {
  size_t most = 0;
  for (const Area& area : scratch_) most = std::max(most, area.bytes);
  for (Area& area : scratch_) {
    if (area.bytes < most) Allocate(area, most);
  }
}

std::byte* BackendContext::SharedScratch(size_t bytes) { return Grow(shared_, bytes); }

std::byte* BackendContext::Grow(Area& area, size_t bytes) {
  if (bytes <= area.bytes && area.memory != nullptr) return area.aligned;
  // At least doubling, so that slowly growing requests settle after a few.
  Allocate(area, std::max({bytes, 2 * area.bytes, size_t{4096}}));
  return area.aligned;
}

void BackendContext::Allocate(Area& area, size_t bytes) {
  area.memory.reset();
  area.memory.reset(new std::byte[bytes + kAlignment]);
  const auto address = reinterpret_cast<uintptr_t>(area.memory.get());
  area.aligned = area.memory.get() + (kAlignment - address % kAlignment) % kAlignment;
  area.bytes = bytes;
}

}  // namespace longspan::cpu
