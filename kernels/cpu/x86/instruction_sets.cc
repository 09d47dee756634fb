#include "kernels/cpu/instruction_set.h"

#include "kernels/cpu/x86/sets.h"

namespace longspan::cpu {
namespace {

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool HasAvx512Bf16() { return HasAvx512() && __builtin_cpu_supports("avx512bf16"); }

}  // namespace

std::span<const InstructionSet> BuiltSets() {
  static const MatMulKernels avx512 = Avx512MatMul(kAvx2MatMul);
  static const InstructionSet sets[] = {
      {Simd::kAvx512Bf16, HasAvx512Bf16, Avx512Bf16MatMul(avx512), kAvx512AttentionTile,
       kAvx512Bf16DotLoops},
      {Simd::kAvx512, HasAvx512, avx512, kAvx512AttentionTile, kAvx512DotLoops},
      {Simd::kAvx2, HasAvx2, kAvx2MatMul, kAvx2AttentionTile, kAvx2DotLoops},
      {Simd::kPortable, [] { return true; }, kPortableMatMul, kPortableAttentionTile,
       kPortableDotLoops},
  };
  return sets;
}

}  // namespace longspan::cpu
