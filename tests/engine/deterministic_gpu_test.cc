// A request's tokens are its own on a GPU that was asked to be deterministic.
#include "tests/support/deterministic_law.h"

namespace longspan {
namespace {

TEST(DeterministicOnTheGpu, ARequestsTokensAreItsOwn) {
  std::string why;
  auto backend = Backend::Cuda({.deterministic = true}, &why);
  ASSERT_NE(backend, nullptr) << why;
  testing::DeterministicLaw law(std::move(backend));
  law.ExpectTheSameAgain();
  for (const int batched_tokens : {512, 100, 37, 14}) {
    law.ExpectTheSameAmongNeighbours(batched_tokens);
  }
  law.ExpectTheSameAfterPreemption();
}

}  // namespace
}  // namespace longspan
