#pragma once
// The file of API keys, one a line:
//
//   SECRET [name=NAME] [admin] [max-requests=N] [tokens-per-minute=N]    # a comment
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace longspan {

struct ApiKey {
  std::string secret;
  std::string name;               // what logs and errors call it; key-LINE if the file gives none
  bool admin = false;             // may also drain, resume, reset, and abort others' requests
  int64_t max_requests = 0;       // at once; 0: no limit
  int64_t tokens_per_minute = 0;  // prompt and generated; 0: no limit
};

// InvalidArgument names file, line, what was found and what is allowed, never a secret. A file
// without a key is an error, since nobody could call.
absl::StatusOr<std::vector<ApiKey>> ParseApiKeys(absl::string_view text, absl::string_view file);

// Takes as long for a wrong guess as for a right one of the same length.
bool SameSecret(absl::string_view secret, absl::string_view guess);

}  // namespace longspan
