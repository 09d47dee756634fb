#include "kernels/cpu/instruction_set.h"

#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "kernels/cpu/arm64/sets.h"

namespace longspan::cpu {
namespace {

bool Always() { return true; }

bool HasDotProducts() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

}  // namespace

std::span<const InstructionSet> BuiltSets() {
  static const MatMulKernels neon = NeonMatMul(kPortableMatMul);
  static const InstructionSet sets[] = {
      {Simd::kNeonDot, HasDotProducts, NeonDotMatMul(neon), kNeonAttentionTile, kNeonDotDotLoops},
      {Simd::kNeon, Always, neon, kNeonAttentionTile, kNeonDotLoops},
      {Simd::kPortable, Always, kPortableMatMul, kPortableAttentionTile, kPortableDotLoops},
  };
  return sets;
}

}  // namespace longspan::cpu
