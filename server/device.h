#pragma once
// The device that --device names.
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace longspan {

// device: "cpu" or "cuda:N"; threads: of a CPU, 0 is one per usable core; deterministic: as in
// CudaOptions, which a CPU is anyway. InvalidArgument for any other name, Unavailable with the
// reason for a GPU that cannot be used.
absl::StatusOr<std::unique_ptr<Backend>> OpenDevice(const std::string& device, int threads,
                                                    bool deterministic = false);

}  // namespace longspan
