// A request's tokens are its own on the CPU, which is deterministic without being asked.
#include "tests/support/deterministic_law.h"

namespace longspan {
namespace {

TEST(DeterministicOnTheCpu, ARequestsTokensAreItsOwn) {
  testing::DeterministicLaw law(Backend::Cpu({.threads = 2}));
  law.ExpectTheSameAmongNeighbours(37);
  law.ExpectTheSameAfterPreemption();
}

TEST(DeterministicOnTheCpu, ARequestsTokensAreItsOwnFromQ8_0Too) {
  testing::DeterministicLaw law(Backend::Cpu({.threads = 2}), DType::kQ8_0);
  law.ExpectTheSameAmongNeighbours(37);
  law.ExpectTheSameAfterPreemption();
}

}  // namespace
}  // namespace longspan
