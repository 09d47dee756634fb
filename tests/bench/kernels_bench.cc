// Speed of MatMul per weight type and shape, beside what the machine itself reaches in the same
// run. Usage: kernels_bench [threads] [simd] [substring of the shapes to run]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "kernels/backend.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

struct Shape {
  const char* name;
  DType type;
  int64_t out, in;
};

// Gemma 3 270M as its Q4_K_M file stores it, and the default model.
constexpr Shape kShapes[] = {
    {"gemma qk", DType::kQ5_0, 1280, 640},
    {"gemma v", DType::kQ8_0, 256, 640},
    {"gemma o", DType::kQ4_K, 640, 1024},
    {"gemma gate|up", DType::kQ5_0, 4096, 640},
    {"gemma down", DType::kQ4_K, 640, 2048},
    {"gemma down", DType::kQ6_K, 640, 2048},
    {"gemma vocabulary", DType::kQ8_0, 262144, 640},
    {"default gate|up", DType::kBF16, 2048, 384},
    {"default down", DType::kBF16, 384, 1024},
    {"large", DType::kF32, 4096, 2048},
    {"large", DType::kF16, 4096, 2048},
    {"large", DType::kBF16, 4096, 2048},
    {"large", DType::kQ8_0, 4096, 2048},
    {"large", DType::kQ4_0, 4096, 2048},
    {"large", DType::kQ5_0, 4096, 2048},
    {"large", DType::kQ4_K, 4096, 2048},
    {"large", DType::kQ5_K, 4096, 2048},
    {"large", DType::kQ6_K, 4096, 2048},
};
constexpr int64_t kRowCounts[] = {1, 2, 4, 8, 64, 512};
constexpr double kSecondsPerCase = 0.25;
constexpr int64_t kColdBytes = int64_t{96} << 20;  // of copies of a matrix: no cache holds them

// The matrix is copied until the caches cannot hold it, and the copies take turns: in a model, too,
// a layer's weights have left the caches when their turn comes again.
double BestSeconds(Backend& backend, const Shape& shape, int64_t rows, std::mt19937& random) {
  const testing::Weights one = testing::RandomWeights(shape.type, shape.out, shape.in, random);
  const int64_t bytes = std::max(backend.WeightBytes(one.view()), one.view().bytes());
  const int64_t copies = std::max<int64_t>(1, kColdBytes / bytes);
  Buffer weights = backend.Allocate(copies * bytes);
  View placed;
  for (int64_t i = 0; i < copies; ++i) {
    placed = testing::Place(backend, one.view(), weights.data() + i * bytes);
  }
  std::vector<float> x = testing::RandomFloats(rows * shape.in, random);
  std::vector<float> out(rows * shape.out);
  MatMulArgs args;
  args.x = View::Matrix(x.data(), DType::kF32, rows, shape.in);
  args.out = View::Matrix(out.data(), DType::kF32, rows, shape.out);
  double best = 1e9, total = 0;
  for (int64_t i = 0; i < 5 || total < kSecondsPerCase; ++i) {
    placed.data = weights.data() + i % copies * bytes;
    args.parts[0] = placed;
    const auto begin = std::chrono::steady_clock::now();
    backend.Run(backend.ops().MatMul, args);
    const std::chrono::duration<double> time = std::chrono::steady_clock::now() - begin;
    best = std::min(best, time.count());
    total += time.count();
  }
  return best;
}

void Report(Backend& backend, const Shape& shape, const Roofline& roof) {
  std::mt19937 random(1);
  for (int64_t rows : kRowCounts) {
    if (shape.out > 100000 && rows > 8) continue;  // a step needs few rows' logits
    const double seconds = BestSeconds(backend, shape, rows, random);
    const double read = static_cast<double>(BytesOf(shape.type, shape.out * shape.in)) / seconds;
    const double rate = 2.0 * rows * shape.out * shape.in / seconds;
    const double rate_roof = roof.OperationsPerSecond(OpId::kMatMul, Info(shape.type).name);
    std::printf(
        "%-18s %-5s %6lld x %4lld  rows %3lld  %10.1f us  %6.2f GB/s (%3.0f %%)  "
        "%7.1f Gop/s (%3.0f %%)\n",
        shape.name, Info(shape.type).name, static_cast<long long>(shape.out),
        static_cast<long long>(shape.in), static_cast<long long>(rows), 1e6 * seconds, 1e-9 * read,
        100 * read / roof.bytes_per_second, 1e-9 * rate, 100 * rate / rate_roof);
    std::fflush(stdout);
  }
}

int Main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 0;
  const std::string simd = argc > 2 ? argv[2] : "";
  const std::string wanted = argc > 3 ? argv[3] : "";
  auto backend = Backend::Cpu({.threads = threads, .simd = simd});
  const Roofline roof = backend->MeasureRoofline();
  const auto rate = [&](DType type) {
    return 1e-9 * roof.OperationsPerSecond(OpId::kMatMul, Info(type).name);
  };
  std::printf("%s: reads %.1f GB/s, fp32 %.1f Gop/s, bf16 %.1f Gop/s, int8 %.1f Gop/s\n",
              backend->name().c_str(), 1e-9 * roof.bytes_per_second, rate(DType::kF32),
              rate(DType::kBF16), rate(DType::kQ8_0));
  for (const Shape& shape : kShapes) {
    const std::string label = std::string(shape.name) + " " + Info(shape.type).name;
    if (label.find(wanted) != std::string::npos) Report(*backend, shape, roof);
  }
  return 0;
}

}  // namespace
}  // namespace longspan

int main(int argc, char** argv) { return longspan::Main(argc, argv); }
