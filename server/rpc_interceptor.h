#pragma once
// What holds for every call of every service: how it ended is counted, and a request that protobuf
// cannot parse is answered with INVALID_ARGUMENT naming the field, where gRPC by itself says
// UNIMPLEMENTED without a word.
#include <grpcpp/support/server_interceptor.h>

#include <memory>

#include "server/metrics.h"

namespace longspan {

// `metrics` outlives the server. Installs protobuf's log handler of this process: its complaints
// about requests go into their answers instead of onto stderr.
std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeRpcInterceptor(
    Metrics& metrics);

}  // namespace longspan
