#pragma once
// longspan.v1.InferenceService over the engine, with gRPC's callback API.
#include <memory>

#include "longspan/v1/inference.grpc.pb.h"
#include "server/frontend.h"

namespace longspan {

std::unique_ptr<grpc::Service> MakeInferenceService(const Frontend& frontend);

}  // namespace longspan
