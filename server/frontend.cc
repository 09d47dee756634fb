#include "server/frontend.h"

#include <iterator>

#include "absl/strings/str_cat.h"

namespace longspan {

absl::StatusOr<Caller> Frontend::Authenticate(const grpc::CallbackServerContext& context,
                                              Role role) const {
  size_t bytes = 0;
  for (const auto& [key, value] : context.client_metadata()) {
    bytes += key.size() + value.size() + 32;  // as HTTP/2 counts a field
  }
  if (bytes > static_cast<size_t>(max_header_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the call's metadata has ", bytes, " bytes, the limit is ", max_header_bytes));
  }
  const auto [begin, end] = context.client_metadata().equal_range("authorization");
  if (begin == end) return access.Authenticate("", role);
  if (std::next(begin) != end) return absl::UnauthenticatedError("authorization is there twice");
  return access.Authenticate(absl::string_view(begin->second.data(), begin->second.size()), role);
}

}  // namespace longspan
