#pragma once
// longspan.v1.ModelService and AdminService.
#include <memory>

#include "longspan/v1/admin.grpc.pb.h"
#include "server/frontend.h"

namespace longspan {

std::unique_ptr<grpc::Service> MakeModelService(const Frontend& frontend);
std::unique_ptr<grpc::Service> MakeAdminService(const Frontend& frontend);

}  // namespace longspan
