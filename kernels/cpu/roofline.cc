#include "kernels/cpu/roofline.h"

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/target.h"

namespace longspan {
namespace {

// Many short runs: on a busy machine the best of them is one that nobody interrupted.
constexpr int kRuns = 200;
constexpr int64_t kIterations = 1 << 15;
constexpr int64_t kReadBytes = int64_t{256} << 20;  // taken in turn,
constexpr int64_t kReadSlice = int64_t{8} << 20;    // so many in a run
constexpr int kChains = 10;  // more than latency times width of the units that do them

// Seconds of the fastest of many runs of body on every thread.
double BestSeconds(ThreadTeam& team, FunctionRef<void(int)> body, FunctionRef<void()> between) {
  double best = 1e9;
  for (int i = 0; i < kRuns; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    team.Run(body);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    best = std::min(best, time.count());
    between();
  }
  return best;
}

uint64_t Sum(const uint64_t* words, int64_t count) {
  uint64_t sum[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sum[j] += words[i + j];
  }
  for (int j = 1; j < 8; ++j) sum[0] += sum[j];
  return sum[0];
}

// Empty assembly makes the compiler believe that a value is used and changed.
// Each loop does kIterations * kChains instructions and says how many operations one of them is.
struct DotLoop {
  void (*run)();
  int operations;
};

void FloatPortable() {
  float sum[kChains] = {};
  float a = 1, b = 1e-9f;
  for (int64_t i = 0; i < kIterations; ++i) {
    for (float& s : sum) {
      s += a * b;
      asm volatile("" : "+x"(s));
    }
  }
}

void Int8Portable() {
  int32_t sum[kChains] = {};
  int8_t a = 3, b = 5;
  for (int64_t i = 0; i < kIterations; ++i) {
    for (int32_t& s : sum) {
      s += a * b;
      asm volatile("" : "+r"(s));
    }
  }
}

LONGSPAN_AVX2 void FloatAvx2() {
  __m256 sum[kChains], a = _mm256_set1_ps(1), b = _mm256_set1_ps(1e-9f);
  LONGSPAN_UNROLL
  for (int c = 0; c < kChains; ++c) sum[c] = _mm256_setzero_ps();
  for (int64_t i = 0; i < kIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      sum[c] = _mm256_fmadd_ps(a, b, sum[c]);
      asm volatile("" : "+x"(sum[c]));
    }
  }
}

LONGSPAN_AVX2 void Int8Avx2() {
  __m256i sum[kChains], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  LONGSPAN_UNROLL
  for (int c = 0; c < kChains; ++c) sum[c] = _mm256_setzero_si256();
  for (int64_t i = 0; i < kIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      asm volatile("" : "+x"(a));
      sum[c] = _mm256_add_epi16(sum[c], _mm256_maddubs_epi16(a, b));
      asm volatile("" : "+x"(sum[c]));
    }
  }
}

LONGSPAN_AVX512 void FloatAvx512() {
  __m512 sum[kChains], a = _mm512_set1_ps(1), b = _mm512_set1_ps(1e-9f);
  LONGSPAN_UNROLL
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < kIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      sum[c] = _mm512_fmadd_ps(a, b, sum[c]);
      asm volatile("" : "+v"(sum[c]));
    }
  }
}

LONGSPAN_AVX512 void Int8Avx512() {
  __m512i sum[kChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  LONGSPAN_UNROLL
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_setzero_si512();
  for (int64_t i = 0; i < kIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      sum[c] = _mm512_dpbusd_epi32(sum[c], a, b);
      asm volatile("" : "+v"(sum[c]));
    }
  }
}

LONGSPAN_AVX512_BF16 void Bf16Avx512() {
  const auto ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  __m512 sum[kChains];
  LONGSPAN_UNROLL
  for (int c = 0; c < kChains; ++c) sum[c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < kIterations; ++i) {
    LONGSPAN_UNROLL
    for (int c = 0; c < kChains; ++c) {
      sum[c] = _mm512_dpbf16_ps(sum[c], ones, ones);
      asm volatile("" : "+v"(sum[c]));
    }
  }
}

DotLoop LoopOf(Simd simd, DotKind kind) {
  if (simd == Simd::kAvx512Bf16 && kind == DotKind::kBf16) return {Bf16Avx512, 64};
  const bool is_float = kind != DotKind::kInt8;
  switch (simd) {
    case Simd::kPortable:
      break;
    case Simd::kAvx2:
      return is_float ? DotLoop{FloatAvx2, 16} : DotLoop{Int8Avx2, 64};
    case Simd::kAvx512:
    case Simd::kAvx512Bf16:
      return is_float ? DotLoop{FloatAvx512, 32} : DotLoop{Int8Avx512, 128};
  }
  return is_float ? DotLoop{FloatPortable, 2} : DotLoop{Int8Portable, 2};
}

}  // namespace

double MeasuredReadBandwidth(int threads) {
  ThreadTeam team(threads);
  const int64_t share = kReadSlice / 8 / threads;
  const int64_t slices = kReadBytes / kReadSlice;
  const std::vector<uint64_t> words(kReadBytes / 8, 1);
  std::vector<uint64_t> sums(threads);  // kept, so that the reading is
  int64_t turn = 0;
  const double seconds = BestSeconds(
      team,
      [&](int thread) {
        const uint64_t* slice = words.data() + turn % slices * (kReadSlice / 8);
        sums[thread] += Sum(slice + thread * share, share);
      },
      [&] { ++turn; });
  return static_cast<double>(share * threads * 8) / seconds;
}

double MeasuredDotRate(int threads, Simd simd, DotKind kind) {
  ThreadTeam team(threads);
  const DotLoop loop = LoopOf(simd, kind);
  const double seconds = BestSeconds(
      team, [&](int) { loop.run(); }, [] {});
  return static_cast<double>(threads) * kIterations * kChains * loop.operations / seconds;
}

}  // namespace longspan
