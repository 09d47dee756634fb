#pragma once
// Runs the op Sample over a step's draws, from backend memory that was allocated once. Engine
// thread.
#include <cstdint>
#include <vector>

#include "engine/sampler.h"
#include "kernels/backend.h"

namespace longspan {

class TokenDrawer {
 public:
  // max_edits: of one draw, at least.
  TokenDrawer(Backend& backend, size_t max_edits);

  // The token of each draw from `logits` [rows, vocab]. Waits for the device. Valid until the next
  // call.
  const std::vector<int32_t>& Tokens(const View& logits, const DrawList& list);

 private:
  // Draws [begin, end), whose edits together fit.
  void Run(const View& logits, const DrawList& list, size_t begin, size_t end, int32_t* tokens);

  Backend& backend_;
  const size_t max_edits_;  // of one run
  Buffer draws_, edits_, tokens_;
  std::vector<Draw> staged_;
  std::vector<int32_t> drawn_;
};

}  // namespace longspan
