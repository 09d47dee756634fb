#include "kernels/cpu/roofline.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/parallel.h"

namespace longspan {
namespace {

// Many short runs: on a busy machine the best of them is one that nobody interrupted.
constexpr int kRuns = 200;
constexpr int64_t kReadBytes = int64_t{256} << 20;  // taken in turn,
constexpr int64_t kReadSlice = int64_t{8} << 20;    // so many in a run

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

cpu::DotLoop LoopOf(Simd simd, DotKind kind) {
  const cpu::DotLoops& loops = cpu::SetOf(simd).dot_loops;
  switch (kind) {
    case DotKind::kFloat:
      break;
    case DotKind::kBf16:
      return loops.bf16;
    case DotKind::kInt8:
      return loops.int8;
  }
  return loops.f32;
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
  const cpu::DotLoop loop = LoopOf(simd, kind);
  const double seconds = BestSeconds(
      team, [&](int) { loop.run(); }, [] {});
  return static_cast<double>(threads * loop.operations) / seconds;
}

}  // namespace longspan
