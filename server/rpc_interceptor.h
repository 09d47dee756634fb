#pragma once
// What holds for every call of every service: how it ended is counted; a request that protobuf
// cannot parse is answered with INVALID_ARGUMENT naming the field, where gRPC by itself says
// UNIMPLEMENTED without a word; and services that are not ours (reflection) ask for a key too, but
// for health. Ours ask for themselves, before they do anything (Frontend::Authenticate).
#include <grpcpp/support/server_interceptor.h>

#include <memory>

#include "server/access.h"
#include "server/metrics.h"

namespace longspan {

// Both outlive the server. Installs protobuf's log handler of this process: its complaints
// about requests go into their answers instead of onto stderr.
std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeRpcInterceptor(
    Metrics& metrics, Access& access);

}  // namespace longspan
