#pragma once
// What the CPU ops take from an instruction set, and which sets this build has: those of
// x86/instruction_sets.cc or arm64/instruction_sets.cc, by the processor that CMake builds for.
#include <span>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/dot_loops.h"
#include "kernels/cpu/matmul_kernels.h"
#include "kernels/cpu/simd.h"

namespace longspan::cpu {

struct InstructionSet {
  Simd simd;
  bool (*machine_runs)();  // whether this processor has its instructions
  MatMulKernels matmul;
  const AttentionTile& attention;
  const DotLoops& dot_loops;
};

std::span<const InstructionSet> BuiltSets();  // the fastest first, portable last
const InstructionSet& SetOf(Simd simd);       // one of these

}  // namespace longspan::cpu
