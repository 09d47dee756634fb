#pragma once
// absl::Status to grpc::Status with google.rpc details: BadRequest for a field ("sampling.top_p: is
// 2, …"), ErrorInfo for a reason (kErrorReason payload), RetryInfo for what passes by waiting.
#include <grpcpp/grpcpp.h>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace longspan {

// Tells the client when to come again: RetryInfo and the pushback trailer.
absl::Status WithRetry(absl::Status status, absl::Duration after);

grpc::Status ToGrpc(const absl::Status& status);
// Also sets the trailer grpc-retry-pushback-ms where the client should come again.
grpc::Status ToGrpc(const absl::Status& status, grpc::CallbackServerContext* context);
const char* CodeName(const grpc::Status& status);  // "NOT_FOUND"

}  // namespace longspan
