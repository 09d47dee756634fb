#pragma once
// The instruction sets that CPU kernels come in, and which of them this machine runs.
#include <optional>
#include <string_view>

namespace longspan {

enum class Simd : unsigned char {
  kPortable,  // plain C++
  kAvx2,      // AVX2, FMA, F16C
  kAvx512,    // AVX-512 F, BW, VL, DQ and VNNI
  // AVX-512 with BF16's dot product: products with BF16 weights round x to BF16. Never chosen
  // unless named.
  kAvx512Bf16,
  kNeon,     // of every 64-bit Arm processor
  kNeonDot,  // NEON with dot products of bytes (FEAT_DotProd)
};
inline constexpr Simd kSimds[] = {Simd::kAvx512Bf16, Simd::kAvx512, Simd::kAvx2,
                                  Simd::kNeonDot,    Simd::kNeon,   Simd::kPortable};

const char* SimdName(Simd simd);  // "avx512_bf16", "avx512", "avx2", "neon_dot", "neon", "portable"
std::optional<Simd> ParseSimd(std::string_view name);  // nullopt: no such name
bool MachineRuns(Simd simd);
Simd BestSimd();  // the fastest of those that round no activation

}  // namespace longspan
