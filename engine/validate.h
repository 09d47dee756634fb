#pragma once
// Whether a request can be served at all: pure checks against the model and fixed limits.
#include "absl/status/status.h"
#include "engine/request.h"

namespace longspan {

struct RequestLimits {
  int vocab = 0;
  int max_context = 0;                    // prompt + max_tokens
  static constexpr int kMaxChoices = 64;  // each holds its own cache: unbounded n is an easy OOM
  static constexpr int kMaxStops = 16;
  static constexpr int kMaxStopBytes = 1024;
  static constexpr int kMaxStopIds = 256;
  static constexpr int kMaxBiases = 1024;
  static constexpr int kMaxLogprobs = 20;
  static constexpr int kMaxProbes = 64;
};

// InvalidArgument "field: what it is, what the limit is". The part before the first ':' is the
// request field's name in the API (such as "sampling.top_p"), which the server puts into its error
// details.
absl::Status Validate(const Request& request, const RequestLimits& limits);

}  // namespace longspan
