#include "models/random_checkpoint.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/backend.h"
#include "kernels/convert.h"
#include "kernels/cpu/parallel.h"
#include "models/checkpoint_file.h"
#include "models/family.h"

namespace longspan {
namespace {

constexpr size_t kMaxConfigBytes = 4 << 20;
constexpr float kDeviation = 0.02f;
constexpr int64_t kAlignment = 4096;  // of a matrix, as in a mapped file

// Matrices repeat one run of so many blocks (of plain types: numbers). It is prime, so that no two
// rows of a matrix are equal, and neither are matrices, which begin kStride blocks apart.
constexpr int64_t kRun = 1'000'003;
constexpr int64_t kStride = 611'953;

// SplitMix64 (Steele, Lea and Flood 2014).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // Nearly normal, of mean 0 and deviation 1: four uniform numbers, each of variance 2^32 / 12.
  float Normal() {
    const uint64_t bits = Bits();
    int sum = 0;
    for (int shift = 0; shift < 64; shift += 16) sum += static_cast<int>(bits >> shift & 0xffff);
    return static_cast<float>(sum - 2 * 0xffff) * (1.7320508f / 65536);
  }
  void Fill(std::byte* to, int words) {
    for (int i = 0; i < words; ++i) {
      const uint64_t bits = Bits();
      std::memcpy(to + 8 * i, &bits, 8);
    }
  }

 private:
  uint64_t state_;
};

void Store16(uint16_t bits, std::byte* to) { std::memcpy(to, &bits, 2); }

// d * q: q uniform from -127 to 127 has deviation 73, d is an F16 from 0.000244 to 0.000305.
void WriteQ8_0(Random& random, std::byte* to) {
  Store16(static_cast<uint16_t>(3 << 10 | (random.Bits() & 0xff)), to);
  random.Fill(to + 2, 4);
  for (int i = 2; i < 34; ++i) {
    if (to[i] == std::byte{0x80}) to[i] = std::byte{0};  // -128, which no quantiser makes
  }
}

// scale * (d * q - dmin): each group's min is its scale, from 32 to 63, and dmin is 7.5 * d, so
// that the mean is 0.
void WriteQ4_K(Random& random, std::byte* to) {
  Store16(1 << 10 | 512, to);      // d = 2^-14 * 1.5
  Store16(4 << 10 | 416, to + 2);  // 7.5 * d
  const uint64_t bits = random.Bits();
  for (int i = 0; i < 4; ++i) {
    const auto low = static_cast<uint8_t>(32 | (bits >> 10 * i & 31));         // of group i
    const auto high = static_cast<uint8_t>(32 | (bits >> (10 * i + 5) & 31));  // of group i + 4
    const auto first = static_cast<std::byte>(low | (high >> 4) << 6);
    to[4 + i] = to[8 + i] = first;
    to[12 + i] = static_cast<std::byte>((high & 15) * 17);
  }
  random.Fill(to + 16, 16);
}

std::vector<std::byte> MakeRun(const RandomWeights& weights) {
  CHECK(weights.matrices == DType::kBF16 || weights.matrices == DType::kQ8_0 ||
        weights.matrices == DType::kQ4_K)
      << Info(weights.matrices).name;
  const int64_t block = Info(weights.matrices).block_bytes;
  std::vector<std::byte> run(kRun * block);
  Random random(weights.seed);
  for (int64_t i = 0; i < kRun; ++i) {
    std::byte* to = run.data() + i * block;
    if (weights.matrices == DType::kQ8_0) {
      WriteQ8_0(random, to);
    } else if (weights.matrices == DType::kQ4_K) {
      WriteQ4_K(random, to);
    } else {
      Store16(ToBf16(kDeviation * random.Normal()), to);
    }
  }
  return run;
}

// What Linux thinks it can give without swapping; -1 when it does not say.
int64_t AvailableBytes() {
  std::ifstream in("/proc/meminfo");
  std::string name, rest;
  int64_t kib = 0;
  while (in >> name >> kib && std::getline(in, rest)) {
    if (name == "MemAvailable:") return kib * 1024;
  }
  return -1;
}

using Memory = std::unique_ptr<std::byte, decltype(&std::free)>;

int64_t Aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Not touched yet: the kernel gives its pages when they are written.
absl::StatusOr<Memory> AllocateWeights(const std::string& path, int64_t bytes) {
  const int64_t available = AvailableBytes();
  Memory memory(nullptr, &std::free);
  if (available < 0 || bytes <= available) {
    memory.reset(static_cast<std::byte*>(std::aligned_alloc(kAlignment, bytes)));
  }
  if (memory != nullptr) return memory;
  return absl::ResourceExhaustedError(absl::StrCat(path, ": its random weights need ", bytes,
                                                   " bytes of memory, ", available,
                                                   " are available"));
}

class RandomCheckpoint : public Checkpoint {
 public:
  RandomCheckpoint(std::string path, std::string config)
      : Checkpoint(std::move(path)), config_(std::move(config)) {}

  absl::Status Fill(const ModelSpec& spec, const RandomWeights& weights);

  Format format() const override { return Format::kSafetensors; }
  absl::StatusOr<std::string> ReadSideFile(absl::string_view basename) const override {
    return basename == "config.json" ? config_ : "";
  }
  const GgufMetadata& gguf() const override { return gguf_; }

 private:
  struct Matrix {
    const Slot* slot = nullptr;
    int64_t blocks = 0, first = 0;  // the first one's place in the run
    int64_t offset = 0;             // bytes from the start of memory_
  };
  absl::Status LayOut(const std::vector<Slot>& slots, const RandomWeights& weights,
                      std::vector<Matrix>* matrices, int64_t* bytes) const;
  void Add(const Slot& slot, DType dtype, const void* data);

  std::string config_;
  GgufMetadata gguf_;
  std::vector<std::vector<float>> vectors_;
  Memory memory_{nullptr, &std::free};
};

void RandomCheckpoint::Add(const Slot& slot, DType dtype, const void* data) {
  TensorInfo tensor;
  tensor.name = slot.tensor;
  tensor.dtype = dtype;
  tensor.shape = slot.shape;
  tensor.file = path_;
  int64_t elements = 1;
  for (const int64_t n : slot.shape) elements *= n;
  tensor.data = {static_cast<const std::byte*>(data),
                 static_cast<size_t>(BytesOf(dtype, elements))};
  tensors_[slot.tensor] = std::move(tensor);
}

absl::Status RandomCheckpoint::LayOut(const std::vector<Slot>& slots, const RandomWeights& weights,
                                      std::vector<Matrix>* matrices, int64_t* bytes) const {
  const DTypeInfo info = Info(weights.matrices);
  int64_t total = 0, largest = 0;
  for (const Slot& slot : slots) {
    if (slot.shape.size() != 2) continue;
    const int64_t rows = slot.shape[0], columns = slot.shape[1];
    if (columns % info.block_elements != 0) {
      return absl::InvalidArgumentError(absl::StrCat(
          path_, ": tensor ", slot.tensor, " has rows of ", columns, " numbers, not a multiple of ",
          info.name, "'s block of ", info.block_elements));
    }
    Matrix matrix;
    matrix.slot = &slot;
    matrix.first = static_cast<int64_t>(matrices->size()) * kStride % kRun;
    matrix.offset = weights.overlapping ? matrix.first * info.block_bytes : total;
    int64_t size = 0;
    if (__builtin_mul_overflow(rows, columns / info.block_elements, &matrix.blocks) ||
        __builtin_mul_overflow(matrix.blocks, info.block_bytes, &size) ||
        __builtin_add_overflow(total, size, &total) || total > INT64_MAX - kAlignment) {
      return absl::InvalidArgumentError(absl::StrCat(path_, ": the weights up to tensor ",
                                                     slot.tensor, " of ", rows, " x ", columns,
                                                     " numbers overflow 63 bits of bytes"));
    }
    total = Aligned(total);
    largest = std::max(largest, size);
    matrices->push_back(matrix);
  }
  *bytes = weights.overlapping ? Aligned(largest + kRun * info.block_bytes) : total;
  return absl::OkStatus();
}

absl::Status RandomCheckpoint::Fill(const ModelSpec& spec, const RandomWeights& weights) {
  const std::vector<Slot> slots = SlotsOf(spec, format());
  std::vector<Matrix> matrices;
  int64_t bytes = 0;
  absl::Status laid_out = LayOut(slots, weights, &matrices, &bytes);
  if (!laid_out.ok()) return laid_out;
  absl::StatusOr<Memory> memory = AllocateWeights(path_, bytes);
  if (!memory.ok()) return memory.status();
  memory_ = *std::move(memory);

  const int64_t block = Info(weights.matrices).block_bytes;
  const std::vector<std::byte> run = MakeRun(weights);
  ThreadTeam team(Backend::CpuThreads());
  const auto repeat = [&](int64_t first, int64_t blocks, std::byte* to) {
    team.For(blocks, kRun / 8, [&](int64_t begin, int64_t end, int) {
      while (begin < end) {
        const int64_t from = (first + begin) % kRun;
        const int64_t count = std::min(end - begin, kRun - from);
        std::memcpy(to + begin * block, run.data() + from * block, count * block);
        begin += count;
      }
    });
  };
  if (weights.overlapping) repeat(0, bytes / block, memory_.get());
  for (const Matrix& matrix : matrices) {
    std::byte* data = memory_.get() + matrix.offset;
    if (!weights.overlapping) repeat(matrix.first, matrix.blocks, data);
    Add(*matrix.slot, weights.matrices, data);
  }
  Random random(~weights.seed);
  for (const Slot& slot : slots) {
    if (slot.shape.size() != 1) continue;
    std::vector<float>& values = vectors_.emplace_back(slot.shape[0]);
    const float mean = slot.plus_one ? 0 : 1;
    for (float& value : values) value = mean + kDeviation * random.Normal();
    Add(slot, DType::kF32, values.data());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Checkpoint>> MakeRandomCheckpoint(const std::string& config,
                                                                 const RandomWeights& weights) {
  absl::StatusOr<std::string> text = ReadSmallFile(config, kMaxConfigBytes);
  if (!text.ok()) return text.status();
  auto checkpoint = std::make_unique<RandomCheckpoint>(config, *std::move(text));
  const absl::StatusOr<ModelSpec> spec = ReadSpec(*checkpoint);
  if (!spec.ok()) return spec.status();
  if (absl::Status filled = checkpoint->Fill(*spec, weights); !filled.ok()) return filled;
  return checkpoint;
}

}  // namespace longspan
