#pragma once
// longspan.v1.AttentionService: snapshots of the engine's span totals, once or at intervals.
#include <memory>

#include "longspan/v1/attention.grpc.pb.h"
#include "server/frontend.h"

namespace longspan {

std::unique_ptr<grpc::Service> MakeAttentionService(const Frontend& frontend);

}  // namespace longspan
