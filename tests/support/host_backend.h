#pragma once
// A backend of ordinary memory, for tests of what stores and copies; of no ops unless given.
#include <cstdlib>
#include <cstring>

#include "kernels/backend.h"

namespace longspan {

class HostBackend : public Backend {
 public:
  explicit HostBackend(const OpTable& ops = OpTable(), BackendContext* context = nullptr)
      : Backend("host", context, ops, /*host_memory=*/true) {}

  Buffer Allocate(size_t bytes) override {
    if (bytes > refuse_above) return Buffer();
    return Buffer(std::calloc(bytes, 1), bytes, [](void* data, size_t) { std::free(data); });
  }
  void CopyIn(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void CopyOut(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void CopyWithin(void* to, const void* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
    copied_within += bytes;
  }

  Roofline MeasureRoofline() override { return {}; }

  size_t refuse_above = SIZE_MAX;  // Allocate() of more yields an empty Buffer
  size_t copied_within = 0;
};

}  // namespace longspan
