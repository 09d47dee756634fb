#pragma once
// A unary call that is answered at once.
#include <grpcpp/grpcpp.h>

#include "server/frontend.h"
#include "server/status.h"

namespace longspan {

// body: absl::Status(const Caller&), called only for a caller who may. Its status is the call's.
template <class Body>
grpc::ServerUnaryReactor* Answer(const Frontend& frontend, grpc::CallbackServerContext* context,
                                 Role role, const Body& body) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const auto caller = frontend.Authenticate(*context, role);
  reactor->Finish(ToGrpc(caller.ok() ? body(*caller) : caller.status(), context));
  return reactor;
}

}  // namespace longspan
