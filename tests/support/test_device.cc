#include "tests/support/test_device.h"

#include <cstdlib>
#include <utility>

#include "server/device.h"

namespace longspan::testing {

std::unique_ptr<Backend> OpenTestDevice(int threads, const std::string& device) {
  const char* told = std::getenv("LONGSPAN_DEVICE");
  auto backend = OpenDevice({.device = told != nullptr ? told : device, .threads = threads});
  CHECK(backend.ok()) << backend.status();
  return *std::move(backend);
}

}  // namespace longspan::testing
