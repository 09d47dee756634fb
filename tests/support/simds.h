#pragma once
// The CPU's instruction sets, for tests of what holds on each.
#include <vector>

#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/simd.h"

namespace longspan::testing {

// Those that a build for this kind of processor has, run or not.
inline std::vector<const char*> BuiltSimds() {
  std::vector<const char*> names;
  for (const cpu::InstructionSet& set : cpu::BuiltSets()) names.push_back(SimdName(set.simd));
  return names;
}

inline std::vector<const char*> RunnableSimds() {
  std::vector<const char*> names;
  for (Simd simd : kSimds) {
    if (MachineRuns(simd)) names.push_back(SimdName(simd));
  }
  return names;
}

}  // namespace longspan::testing
