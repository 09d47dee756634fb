#include "server/device.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace longspan {

absl::StatusOr<std::unique_ptr<Backend>> OpenDevice(const std::string& device, int threads,
                                                    bool deterministic) {
  if (device == "cpu") return Backend::Cpu({.threads = threads});
  absl::string_view number = device;
  int index = 0;
  if (!absl::ConsumePrefix(&number, "cuda:") || !absl::SimpleAtoi(number, &index) || index < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("--device is '", device, "', must be cpu or cuda:N"));
  }
  std::string why;
  auto backend = Backend::Cuda({.device = index, .deterministic = deterministic}, &why);
  if (backend == nullptr) return absl::UnavailableError(absl::StrCat(device, ": ", why));
  return backend;
}

}  // namespace longspan
