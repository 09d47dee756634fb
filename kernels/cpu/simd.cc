#include "kernels/cpu/simd.h"

namespace longspan {
namespace {

constexpr Simd kAll[] = {Simd::kAvx512, Simd::kAvx2, Simd::kPortable};  // best first

}  // namespace

const char* SimdName(Simd simd) {
  switch (simd) {
    case Simd::kPortable:
      return "portable";
    case Simd::kAvx2:
      return "avx2";
    case Simd::kAvx512:
      return "avx512";
  }
  return "?";
}

std::optional<Simd> ParseSimd(std::string_view name) {
  for (Simd simd : kAll) {
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
  }
  return false;
}

Simd BestSimd() {
  for (Simd simd : kAll) {
    if (MachineRuns(simd)) return simd;
  }
  return Simd::kPortable;
}

}  // namespace longspan
