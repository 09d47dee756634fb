#include "kernels/cpu/simd.h"

namespace longspan {

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
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (simd) {
    case Simd::kPortable:
      return true;
    case Simd::kAvx2:
      return avx2;
    case Simd::kAvx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vnni");
    case Simd::kAvx512Bf16:
      return MachineRuns(Simd::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
}

Simd BestSimd() {
  for (Simd simd : {Simd::kAvx512, Simd::kAvx2}) {
    if (MachineRuns(simd)) return simd;
  }
  return Simd::kPortable;
}

}  // namespace longspan
