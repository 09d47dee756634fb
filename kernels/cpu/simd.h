#pragma once
// The instruction sets that CPU kernels come in, and which of them this machine runs.
#include <optional>
#include <string_view>

namespace longspan {

enum class Simd : unsigned char {
  kPortable,  // plain C++
  kAvx2,      // AVX2, FMA, F16C
  kAvx512,    // AVX-512 F, BW, VL, DQ and VNNI
};

const char* SimdName(Simd simd);                       // "portable", "avx2", "avx512"
std::optional<Simd> ParseSimd(std::string_view name);  // nullopt: no such name
bool MachineRuns(Simd simd);
Simd BestSimd();

}  // namespace longspan
