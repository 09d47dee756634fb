#include "server/device.h"

#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/cpu/simd.h"

namespace longspan {

namespace {

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

}  // namespace longspan
