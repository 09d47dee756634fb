#pragma once
// JSON from hostile files: strict syntax, no duplicate keys, bounded depth and size. Errors name
// the file, the place and the limit.
#include <cstdint>
#include <string>

#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace longspan {

struct JsonLimits {
  int depth = 32;           // nested arrays and objects
  int64_t values = 100000;  // of all kinds, so that small text cannot become a large tree
};

// `file` is only for messages. The text must be one JSON object.
absl::StatusOr<nlohmann::json> ParseJsonObject(absl::string_view text, absl::string_view file,
                                               JsonLimits limits);

// For messages: at most 80 characters of hostile text, control characters escaped.
std::string Quoted(absl::string_view text);

}  // namespace longspan
