#include "server/frontend.h"

namespace longspan {

absl::StatusOr<Caller> Frontend::Authenticate(const grpc::CallbackServerContext& context,
                                              Role role) const {
  const auto [begin, end] = context.client_metadata().equal_range("authorization");
  if (begin == end) return access.Authenticate("", role);
  if (std::next(begin) != end) return absl::UnauthenticatedError("authorization is there twice");
  return access.Authenticate(absl::string_view(begin->second.data(), begin->second.size()), role);
}

}  // namespace longspan
