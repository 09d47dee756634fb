#include "server/device.h"

#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "kernels/cpu/simd.h"

namespace longspan {

namespace {

// The default first. Named as the formats are, in small letters: llama.cpp's names.
constexpr DType kKvDtypes[] = {DType::kBF16, DType::kF32, DType::kQ8_0};

std::vector<std::string> KvDtypeNames() {
  std::vector<std::string> names;
  for (const DType type : kKvDtypes) names.push_back(absl::AsciiStrToLower(Info(type).name));
  return names;
}

absl::StatusOr<std::unique_ptr<Backend>> OpenCpu(const DeviceOptions& options) {
  if (options.simd == kBestSimd) return Backend::Cpu({.threads = options.threads});
  const std::optional<Simd> simd = ParseSimd(options.simd);
  if (!simd.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat("--simd: no instructions '", options.simd, "'"));
  }
  if (!MachineRuns(*simd)) {
    return absl::UnavailableError(absl::StrCat(
        "--simd ", options.simd, ": this processor has none, its best are ", SimdName(BestSimd())));
  }
  return Backend::Cpu({.threads = options.threads, .simd = options.simd});
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> OpenDevice(const DeviceOptions& options) {
  if (options.device == "cpu") return OpenCpu(options);
  absl::string_view number = options.device;
  int index = 0;
  if (!absl::ConsumePrefix(&number, "cuda:") || !absl::SimpleAtoi(number, &index) || index < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--device is '", options.device, "', must be cpu or cuda:N"));
  }
  std::string why;
  auto backend = Backend::Cuda({.device = index, .deterministic = options.deterministic}, &why);
  if (backend == nullptr) {
    return absl::UnavailableError(absl::StrCat(options.device, ": ", why));
  }
  return backend;
}

void SimdFlag(Flags& flags, std::string* simd) {
  std::vector<std::string> choices = {kBestSimd};
  for (const Simd each : kSimds) choices.push_back(SimdName(each));
  flags.Choice("simd", simd, std::move(choices),
               "a CPU's instructions; avx512_bf16 multiplies BF16 weights twice as fast and rounds "
               "activations to bf16, the others round none");
}

void KvDtypeFlag(Flags& flags, std::string* kv_dtype) {
  flags.Choice("kv-dtype", kv_dtype, KvDtypeNames(),
               "type of cached keys and values; q8_0 takes 0.53 of bf16's memory, on a CPU, where "
               "head sizes are multiples of 32");
}

absl::StatusOr<DType> KvDtypeOf(absl::string_view kv_dtype, absl::string_view device) {
  for (const DType type : kKvDtypes) {
    if (kv_dtype != absl::AsciiStrToLower(Info(type).name)) continue;
    if (!IsQuantised(type) || device == "cpu") return type;
    return absl::InvalidArgumentError(absl::StrCat("--kv-dtype ", kv_dtype, ": --device ", device,
                                                   " has no such caches, a cpu has"));
  }
  return absl::InvalidArgumentError(absl::StrCat("--kv-dtype is '", kv_dtype, "', must be one of ",
                                                 absl::StrJoin(KvDtypeNames(), ", ")));
}

}  // namespace longspan
