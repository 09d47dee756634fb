// The CPU backend: ordinary memory, a thread team, the op table.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <thread>
#include <utility>

#include "kernels/backend.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/ops_cpu.h"
#include "kernels/cpu/panels.h"
#include "kernels/cpu/roofline.h"

namespace longspan {
namespace {

OpTable CpuOps() {
  OpTable table;
#define LONGSPAN_CPU_OP(name)                                                 \
  table.name.function = [](BackendContext& context, const name##Args& args) { \
    auto& own = static_cast<cpu::BackendContext&>(context);                   \
    cpu::name(own, args);                                                     \
    own.LevelScratch();                                                       \
  };
  LONGSPAN_OPS(LONGSPAN_CPU_OP)
#undef LONGSPAN_CPU_OP
  return table;
}

Simd ChooseSimd(const std::string& name) {
  if (name.empty()) return BestSimd();
  const std::optional<Simd> simd = ParseSimd(name);
  CHECK(simd.has_value()) << "unknown simd '" << name
                          << "': use avx512_bf16, avx512, avx2, neon_dot, neon or portable";
  CHECK(MachineRuns(*simd)) << "this machine cannot run simd '" << name << "'; its best is "
                            << SimdName(BestSimd());
  return *simd;
}

std::string Describe(Simd simd, int threads) {
  return std::string("cpu (") + SimdName(simd) + ", " + std::to_string(threads) +
         (threads == 1 ? " thread)" : " threads)");
}

class CpuBackend : public Backend {
 public:
  CpuBackend(std::unique_ptr<cpu::BackendContext> context, std::string name)
      : Backend(std::move(name), context.get(), CpuOps(), /*host_memory=*/true),
        context_(std::move(context)) {}

  DType ProductInput(const MatMulArgs& product) const override {
    return cpu::ProductInput(product);
  }

  Buffer Allocate(size_t bytes) override {
    if (bytes == 0) return Buffer();
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(data != MAP_FAILED) << "cannot allocate " << bytes << " bytes: " << std::strerror(errno);
    // Advice: a kernel without huge pages may refuse it. One row by weights that no cache holds,
    // AMD EPYC, 1 thread, 4 KiB -> huge pages: Q4_K 4096 x 2048 400 -> 345 us, Q8_0 262144 x
    // 640 15.9 -> 14.3 ms; 64 rows and more within 3 %.
    madvise(data, bytes, MADV_HUGEPAGE);
    return Buffer(data, bytes, [](void* p, size_t n) { munmap(p, n); });
  }
  void CopyIn(void* to, const void* from, size_t bytes) override { CopyWithin(to, from, bytes); }
  void CopyOut(void* to, const void* from, size_t bytes) override { CopyWithin(to, from, bytes); }
  void CopyWithin(void* to, const void* from, size_t bytes) override {
    if (bytes > 0) std::memmove(to, from, bytes);
  }

  int64_t WeightBytes(const View& matrix) const override {
    if (!IsQuantised(matrix.dtype)) return 0;
    return cpu::PackedBytes(matrix.dtype, matrix.shape[0], matrix.shape[1]);
  }
  View PlaceWeights(const View& matrix, std::byte* to) override {
    return cpu::PackWeights(*context_, matrix, to);
  }

  Roofline MeasureRoofline() override {
    const auto rate = [this](DotKind kind) {
      return MeasuredDotRate(context_->team.threads(), context_->simd, kind);
    };
    Roofline roofline = {MeasuredReadBandwidth(context_->team.threads()),
                         rate(DotKind::kFloat),
                         {{Info(DType::kBF16).name, rate(DotKind::kBf16)}}};
    const double int8 = rate(DotKind::kInt8);
    for (const DType type : kBlockTypes) {
      roofline.product_operations_per_second[Info(type).name] = int8;
    }
    return roofline;
  }

 private:
  std::unique_ptr<cpu::BackendContext> context_;
};

}  // namespace

int Backend::CpuThreads() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

std::unique_ptr<Backend> Backend::Cpu(const CpuOptions& options) {
  CHECK_GE(options.threads, 0);
  const int threads = options.threads > 0 ? options.threads : CpuThreads();
  const Simd simd = ChooseSimd(options.simd);
  return std::make_unique<CpuBackend>(std::make_unique<cpu::BackendContext>(threads, simd),
                                      Describe(simd, threads));
}

}  // namespace longspan
