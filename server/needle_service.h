#pragma once
// longspan.v1.NeedleService: needle-in-a-haystack runs through the same engine as everyone's
// requests.
#include <memory>

#include "longspan/v1/needle.grpc.pb.h"
#include "server/frontend.h"

namespace longspan {

std::unique_ptr<grpc::Service> MakeNeedleService(const Frontend& frontend);

}  // namespace longspan
