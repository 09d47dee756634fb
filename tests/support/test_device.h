#pragma once
// The device of tests whose laws hold on every one.
#include <memory>
#include <string>

#include "kernels/backend.h"

namespace longspan::testing {

// $LONGSPAN_DEVICE, as `longspan serve` takes it, else `device`; dies (CHECK) if it cannot be
// opened, so that a machine without it passes nothing. threads: of a CPU.
std::unique_ptr<Backend> OpenTestDevice(int threads, const std::string& device = "cpu");

}  // namespace longspan::testing
