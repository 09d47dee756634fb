#pragma once
// The device that --device names, and how it computes.
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "server/flags.h"

namespace longspan {

inline constexpr char kBestSimd[] = "best";

struct DeviceOptions {
  std::string device = "cpu";  // or "cuda:N"
  // Of a CPU, as in CpuOptions.
  int threads = 0;
  std::string simd = kBestSimd;  // or a name that SimdName() gives
  bool deterministic = false;    // as in CudaOptions; a CPU is so anyway
};

// InvalidArgument for a name that there is not, Unavailable with the reason for a GPU or
// instructions that cannot be used.
absl::StatusOr<std::unique_ptr<Backend>> OpenDevice(const DeviceOptions& options);

// --simd, the same in every command that opens a device.
void SimdFlag(Flags& flags, std::string* simd);

// --kv-dtype, the same in every command.
void KvDtypeFlag(Flags& flags, std::string* kv_dtype);
// The type that it names; InvalidArgument where that is none, or none that the device computes on.
absl::StatusOr<DType> KvDtypeOf(absl::string_view kv_dtype, absl::string_view device);

}  // namespace longspan
