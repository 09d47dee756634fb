#pragma once
// RunNeedleRequest made whole: defaults filled in, every field checked. Pure, so that it can be
// tested without a server.
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "longspan/v1/needle.pb.h"
#include "server/needle_prompt.h"
#include "server/request_conversion.h"

namespace longspan {

struct NeedleLimits {
  static constexpr int kMaxCells = 4096;
  static constexpr int kMaxAxis = 256;  // lengths, or depths
  static constexpr int kMaxKeys = 32;
  static constexpr int kMaxValues = 16;
  static constexpr int kMaxConcurrency = 256;
  static constexpr size_t kMaxTextBytes = 4 << 20;
  static constexpr size_t kMaxIdBytes = 128;
};

// The request as it will run; InvalidArgument names field, value and limit, NotFound an unknown
// model.
absl::StatusOr<v1::RunNeedleRequest> CompleteNeedleRequest(const v1::RunNeedleRequest& request,
                                                           const ConversionContext& context);
// True if two completed requests ask for the same cells: an id may then be re-attached.
bool SameGrid(const v1::RunNeedleRequest& a, const v1::RunNeedleRequest& b);

Haystack HaystackOf(const v1::RunNeedleRequest& completed);
NeedleSpec SpecOf(const v1::RunNeedleRequest& completed, const v1::NeedleCellKey& cell);
// All cells but skip_cells: by trial, then length, then depth.
std::vector<v1::NeedleCellKey> CellsOf(const v1::RunNeedleRequest& completed);
// The completion that answers a cell.
absl::StatusOr<Request> RequestOf(const v1::RunNeedleRequest& completed, const NeedlePrompt& prompt,
                                  const ConversionContext& context);

}  // namespace longspan
