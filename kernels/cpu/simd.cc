#include "kernels/cpu/simd.h"

#include "kernels/check.h"
#include "kernels/cpu/instruction_set.h"

namespace longspan {
namespace {

const cpu::InstructionSet* Find(Simd simd) {
  for (const cpu::InstructionSet& set : cpu::BuiltSets()) {
    if (set.simd == simd) return &set;
  }
  return nullptr;
}

}  // namespace

const char* SimdName(Simd simd) {
  switch (simd) {
    case Simd::kPortable:
      return "portable";
    case Simd::kAvx2:
      return "avx2";
    case Simd::kAvx512:
      return "avx512";
    case Simd::kAvx512Bf16:
      return "avx512_bf16";
    case Simd::kNeon:
      return "neon";
    case Simd::kNeonDot:
      return "neon_dot";
  }
  return "?";
}

std::optional<Simd> ParseSimd(std::string_view name) {
  for (Simd simd : kSimds) {
    if (name == SimdName(simd)) return simd;
  }
  return std::nullopt;
}

bool MachineRuns(Simd simd) {
  const cpu::InstructionSet* set = Find(simd);
  return set != nullptr && set->machine_runs();
}

Simd BestSimd() {
  for (const cpu::InstructionSet& set : cpu::BuiltSets()) {
    const bool rounds = set.matmul.rounded_bf16.multiply != nullptr;
    if (!rounds && set.machine_runs()) return set.simd;
  }
  return Simd::kPortable;
}

namespace cpu {

const InstructionSet& SetOf(Simd simd) {
  const InstructionSet* set = Find(simd);
  CHECK(set != nullptr) << "this build has no " << SimdName(simd);
  return *set;
}

}  // namespace cpu
}  // namespace longspan
