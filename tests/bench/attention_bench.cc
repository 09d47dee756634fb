// Speed of Attention on the shapes that the GPU backend is held to, clocks warmed. An op's time is
// the device's, between two events, the L2 cache flushed before. Of ops that decode it is also
// taken as layers have it: many ops in a row, whose keys and values take turns until what the cache
// holds of the first ones is gone.
//
// Usage: attention_bench [--device cpu|cuda:N] [--json] [--repeats N] [--only SUBSTRING]
//                        [--shrink N]      contexts N times shorter, for a CPU
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"

namespace longspan {
namespace {

// `rows` rows of each sequence in a step: 1 decodes at position `context`, more read `context`
// tokens in so many steps. A full layer's cache holds `room` tokens, if not just the context.
struct Case {
  const char* name;
  int sequences, context, rows, heads, kv_heads, dim, window, room = 0;
};

constexpr Case kCases[] = {
    {"decode 8 x 32k, 32/8 of 128", 8, 32768, 1, 32, 8, 128, 0},
    {"decode 8 x 32k, 8/4 of 256", 8, 32768, 1, 8, 4, 256, 0},
    {"decode 1 x 32k, 32/8 of 128", 1, 32768, 1, 32, 8, 128, 0},
    {"decode 32 x 2k, 8/4 of 256", 32, 2048, 1, 8, 4, 256, 0},
    {"decode 32 x 2k, room for 40k, 8/4 of 256", 32, 2048, 1, 8, 4, 256, 0, 40960},
    {"decode 1 x 2k, 8/4 of 256", 1, 2048, 1, 8, 4, 256, 0},
    {"decode 8 x 2k, 8/4 of 256", 8, 2048, 1, 8, 4, 256, 0},
    {"decode 1 x 2k, window 1k, 8/4 of 256", 1, 2048, 1, 8, 4, 256, 1024},
    {"decode 8 x 2k, window 1k, 8/4 of 256", 8, 2048, 1, 8, 4, 256, 1024},
    {"decode 32 x 8k, window 1k, 8/4 of 256", 32, 8192, 1, 8, 4, 256, 1024},
    {"decode 32 x 128k, window 1k, 8/4 of 256", 32, 131072, 1, 8, 4, 256, 1024},
    {"prefill 32k by 2k, 32/8 of 128", 1, 32768, 2048, 32, 8, 128, 0},
    {"prefill 32k by 2k, 8/4 of 256", 1, 32768, 2048, 8, 4, 256, 0},
    {"prefill 32k by 2k, window 1k, 8/4 of 256", 1, 32768, 2048, 8, 4, 256, 1024},
};
constexpr int kPageTokens = 16;
constexpr double kWarmSeconds = 0.5;
constexpr size_t kFlushBytes = size_t{256} << 20;  // written, or read: more than any L2 holds
constexpr int kOpsInARow = 16;                     // at least
constexpr double kRowSeconds = 0.02;               // of a repetition, at least
constexpr size_t kPatternBytes = size_t{8} << 20;

struct Flags {
  std::string device = "cpu", only;
  bool json = false;
  int repeats = 7, shrink = 1;
};

Buffer Take(Backend& backend, size_t bytes) {
  Buffer buffer = backend.Allocate(bytes);
  if (buffer.data() == nullptr) {
    std::fprintf(stderr, "attention_bench: no memory for %zu bytes\n", bytes);
    std::exit(1);
  }
  return buffer;
}

// Numbers from -1 to 1, the same ones over and over.
template <class T>
Buffer Random(Backend& backend, int64_t count, T (*convert)(float)) {
  static const std::vector<T> pattern = [convert] {
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<T> numbers(kPatternBytes / sizeof(T));
    for (T& x : numbers) x = convert(uniform(random));
    return numbers;
  }();
  Buffer buffer = Take(backend, count * sizeof(T));
  for (size_t at = 0; at < buffer.bytes(); at += kPatternBytes) {
    backend.CopyIn(buffer.data() + at, pattern.data(),
                   std::min(kPatternBytes, buffer.bytes() - at));
  }
  return buffer;
}

Buffer Ints(Backend& backend, const std::vector<int32_t>& values) {
  Buffer buffer = Take(backend, values.size() * sizeof(int32_t));
  backend.CopyIn(buffer.data(), values.data(), buffer.bytes());
  return buffer;
}

// A case's memory and its steps.
class Problem {
 public:
  Problem(Backend& backend, const Case& c) : backend_(backend) {
    const int slots = c.window > 0 ? (c.window - 1 + kPageTokens - 1) / kPageTokens + 1
                                   : std::max(c.context, c.room) / kPageTokens + 1;
    const int64_t layer = int64_t{c.kv_heads} * kPageTokens * c.dim;
    const int64_t page_bytes = 2 * BytesOf(DType::kBF16, layer);
    std::vector<int32_t> table(static_cast<size_t>(c.sequences) * slots);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(2));
    for (int32_t& page : table) page *= static_cast<int32_t>(page_bytes / kPageUnitBytes);
    const int64_t rows = int64_t{c.sequences} * c.rows;
    arena_ = Random(backend, 2 * layer * static_cast<int64_t>(table.size()), ToBf16);
    table_ = Ints(backend, table);
    query_ = Random(
        backend, rows * c.heads * c.dim, +[](float x) { return x; });
    fresh_ = Random(backend, 2 * rows * c.kv_heads * c.dim, ToBf16);
    // As models have it: bf16 where a product on tensor cores follows.
    const DType out = backend.host_memory() ? DType::kF32 : DType::kBF16;
    out_ = Take(backend, BytesOf(out, rows * c.heads * c.dim));

    args_.query = View::Cube(query_.data(), DType::kF32, rows, c.heads, c.dim);
    args_.out = View::Cube(out_.data(), out, rows, c.heads, c.dim);
    args_.key = View::Cube(fresh_.data(), DType::kBF16, rows, c.kv_heads, c.dim);
    args_.value = args_.key;
    args_.value.data = args_.key.row(rows);
    args_.cache.arena = arena_.data();
    args_.cache.value_offset = page_bytes / 2;
    args_.cache.page_tokens = kPageTokens;
    args_.cache.kv_heads = c.kv_heads;
    args_.cache.head_dim = c.dim;
    args_.cache.table = reinterpret_cast<const int32_t*>(table_.data());
    args_.cache.table_stride = args_.cache.slots = slots;
    args_.scale = 1 / std::sqrt(static_cast<float>(c.dim));
    args_.window = c.window;

    for (int s = 0; s <= c.sequences; ++s) row_begin_.push_back(s * c.rows);
    row_begin_there_ = Ints(backend, row_begin_);
    const int last = c.rows > 1 ? c.context - c.rows : c.context;
    for (int at = c.rows > 1 ? 0 : last; at <= last; at += c.rows) {
      starts_.insert(starts_.end(), c.sequences, at);
    }
    starts_there_ = Ints(backend, starts_);
    args_.batch.sequences = c.sequences;
    args_.batch.rows = static_cast<int>(rows);
    args_.batch.host_row_begin = row_begin_.data();
    args_.batch.row_begin = reinterpret_cast<const int32_t*>(row_begin_there_.data());
  }

  // Issues all steps; returns what they cost.
  Work Run() {
    Work work;
    for (size_t at = 0; at < starts_.size(); at += args_.batch.sequences) {
      args_.batch.host_start = starts_.data() + at;
      args_.batch.start = reinterpret_cast<const int32_t*>(starts_there_.data()) + at;
      backend_.Run(backend_.ops().Attention, args_);
      const Work step = Cost(args_);
      work.bytes += step.bytes;
      work.flops += step.flops;
    }
    return work;
  }

  // Until the device has done what was issued.
  void Wait() {
    int32_t any;
    backend_.CopyOut(&any, table_.data(), sizeof(any));
    if (const std::string fault = backend_.Fault(); !fault.empty()) {
      std::fprintf(stderr, "attention_bench: %s: %s\n", backend_.name().c_str(), fault.c_str());
      std::exit(1);
    }
  }

 private:
  Backend& backend_;
  std::vector<int32_t> row_begin_, starts_;  // starts_: [steps, sequences]
  Buffer arena_, table_, query_, fresh_, out_, row_begin_there_, starts_there_;
  AttentionArgs args_;
};

struct Figure {
  Work work;
  std::vector<double> alone, in_a_row;  // seconds of an op in each repetition; in_a_row: or none
};

using Clock = std::chrono::steady_clock;
double SecondsSince(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::vector<double> MeasureAlone(Backend& backend, Problem& problem, Buffer& flush, int repeats) {
  backend.TimeOps(true);
  const OpTotals& totals = backend.Profile(OpId::kAttention);
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) {
    backend.CopyWithin(flush.data(), flush.data() + kFlushBytes, kFlushBytes);
    const int64_t before = totals.nanoseconds;
    problem.Run();
    problem.Wait();
    seconds.push_back(1e-9 * static_cast<double>(totals.nanoseconds - before));
  }
  backend.TimeOps(false);
  return seconds;
}

std::vector<double> MeasureInARow(Backend& backend, std::vector<Problem>& problems, int repeats) {
  static uint64_t key = 0;
  ++key;
  const int ops = std::max<int>(kOpsInARow, problems.size());
  const auto Row = [&] {
    backend.Repeat(key, [&] {
      for (int i = 0; i < ops; ++i) problems[i % problems.size()].Run();
    });
  };
  // Of many rows, behind each other: what the host needs to begin and to wait does not show.
  const auto Time = [&](int rows) {
    const auto begin = Clock::now();
    for (int i = 0; i < rows; ++i) Row();
    problems[0].Wait();
    return SecondsSince(begin);
  };
  Time(2);  // now it is captured
  const int rows = static_cast<int>(std::ceil(kRowSeconds / Time(1)));
  std::vector<double> seconds;
  for (int i = 0; i < repeats; ++i) seconds.push_back(Time(rows) / rows / ops);
  return seconds;
}

Figure Measure(Backend& backend, const Case& c, Buffer& flush, int repeats) {
  std::vector<Problem> problems;
  problems.emplace_back(backend, c);
  Figure figure;
  const auto begin = Clock::now();
  do {
    figure.work = problems[0].Run();
    problems[0].Wait();
  } while (SecondsSince(begin) < kWarmSeconds);
  figure.alone = MeasureAlone(backend, problems[0], flush, repeats);
  if (c.rows > 1) return figure;
  while (problems.size() < 2 || problems.size() * figure.work.bytes < kFlushBytes) {
    problems.emplace_back(backend, c);
  }
  figure.in_a_row = MeasureInARow(backend, problems, repeats);
  return figure;
}

void Print(const char* name, const char* how, const Work& work, std::vector<double> seconds,
           const Roofline& roof) {
  if (seconds.empty()) return;
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[seconds.size() / 2];
  const double read = static_cast<double>(work.bytes) / median;
  const double rate = static_cast<double>(work.flops) / median;
  std::printf("%-42s %-8s %10.1f us (%.1f to %.1f)  %7.1f GB/s %3.0f%%  %8.2f TFLOP/s %3.0f%%\n",
              name, how, 1e6 * median, 1e6 * seconds.front(), 1e6 * seconds.back(), 1e-9 * read,
              100 * read / roof.bytes_per_second, 1e-12 * rate,
              100 * rate / roof.operations_per_second);
  std::fflush(stdout);
}

void PrintJson(const char* name, const Figure& figure, bool first) {
  std::printf("%s\n  {\"name\": \"%s\", \"bytes\": %lld, \"flops\": %lld", first ? "" : ",", name,
              static_cast<long long>(figure.work.bytes), static_cast<long long>(figure.work.flops));
  const auto List = [](const char* field, const std::vector<double>& seconds) {
    std::printf(", \"%s\": [", field);
    for (size_t i = 0; i < seconds.size(); ++i) {
      std::printf("%s%.9f", i > 0 ? ", " : "", seconds[i]);
    }
    std::printf("]");
  };
  List("alone", figure.alone);
  List("in_a_row", figure.in_a_row);
  std::printf("}");
}

bool Parse(int argc, char** argv, Flags* flags) {
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--json") {
      flags->json = true;
      continue;
    }
    if (i + 1 == argc) return false;
    const char* value = argv[++i];
    if (flag == "--device") {
      flags->device = value;
    } else if (flag == "--only") {
      flags->only = value;
    } else if (flag == "--repeats") {
      flags->repeats = std::atoi(value);
    } else if (flag == "--shrink") {
      flags->shrink = std::atoi(value);
    } else {
      return false;
    }
  }
  // Whole pages, and a context of more than a window, at any shrinking.
  return flags->repeats >= 1 && flags->shrink >= 1 && flags->shrink <= 64 &&
         (flags->device == "cpu" || flags->device.rfind("cuda:", 0) == 0);
}

int Main(int argc, char** argv) {
  Flags flags;
  if (!Parse(argc, argv, &flags)) {
    std::fprintf(stderr,
                 "usage: attention_bench [--device cpu|cuda:N] [--json] [--repeats N] "
                 "[--only SUBSTRING] [--shrink N, up to 64]\n");
    return 2;
  }
  std::string why;
  const auto backend = flags.device == "cpu"
                           ? Backend::Cpu({})
                           : Backend::Cuda({.device = std::atoi(flags.device.c_str() + 5)}, &why);
  if (backend == nullptr) {
    std::fprintf(stderr, "attention_bench: %s\n", why.c_str());
    return 1;
  }
  const Roofline roof = backend->MeasureRoofline();
  if (flags.json) {
    std::printf(
        "{\"machine\": \"%s\", \"read_bytes_per_second\": %.0f, "
        "\"operations_per_second\": %.0f, \"cases\": [",
        backend->name().c_str(), roof.bytes_per_second, roof.operations_per_second);
  } else {
    std::printf("%s; it reads %.1f GB/s and does %.2f TFLOP/s, which is 100%%\n",
                backend->name().c_str(), 1e-9 * roof.bytes_per_second,
                1e-12 * roof.operations_per_second);
  }
  Buffer flush = Take(*backend, 2 * kFlushBytes);
  bool first = true;
  for (Case c : kCases) {
    if (std::string(c.name).find(flags.only) == std::string::npos) continue;
    c.context /= flags.shrink;
    c.room /= flags.shrink;
    if (c.rows > 1) c.rows /= flags.shrink;
    if (c.window > 0) c.window /= flags.shrink;
    const Figure figure = Measure(*backend, c, flush, flags.repeats);
    if (flags.json) {
      PrintJson(c.name, figure, std::exchange(first, false));
    } else {
      Print(c.name, "alone", figure.work, figure.alone, roof);
      Print(c.name, "in a row", figure.work, figure.in_a_row, roof);
    }
  }
  if (flags.json) std::printf("\n]}\n");
  return 0;
}

}  // namespace
}  // namespace longspan

int main(int argc, char** argv) { return longspan::Main(argc, argv); }
