#pragma once
// The CPU's instruction sets, for tests of what holds on each.
#include <vector>

#include "kernels/cpu/simd.h"

namespace longspan::testing {

inline std::vector<const char*> RunnableSimds() {
  std::vector<const char*> names;
  for (Simd simd : kSimds) {
    if (MachineRuns(simd)) names.push_back(SimdName(simd));
  }
  return names;
}

}  // namespace longspan::testing
