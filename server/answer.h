#pragma once
// A unary call that is answered at once, or once its long message has been read.
#include <grpcpp/grpcpp.h>

#include <utility>

#include "server/frontend.h"
#include "server/status.h"

namespace longspan {

// body: absl::Status(const Caller&), called only for a caller who may. Its status is the call's.
// bytes: of a message whose text is tokenized, for PromptWorker; body then holds what it uses by
// value.
template <class Body>
grpc::ServerUnaryReactor* Answer(const Frontend& frontend, grpc::CallbackServerContext* context,
                                 Role role, Body body, size_t bytes = 0) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  auto caller = frontend.Authenticate(*context, role);
  if (!caller.ok()) {
    reactor->Finish(ToGrpc(caller.status(), context));
    return reactor;
  }
  frontend.prompt_worker.Run(
      bytes, [context, reactor, body = std::move(body), caller = *std::move(caller)] {
        reactor->Finish(ToGrpc(body(caller), context));
      });
  return reactor;
}

}  // namespace longspan
