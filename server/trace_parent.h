#pragma once
// W3C Trace Context: which trace a call belongs to, as its caller says in `traceparent`.
#include <grpcpp/grpcpp.h>

#include <string>

#include "absl/strings/string_view.h"

namespace longspan {

// 00-<32 hex digits>-<16>-<2>, in lower case, neither id all zeros; later versions may go on after
// that.
bool IsTraceParent(absl::string_view value);
// The metadata's traceparent; "" if there is none, more than one, or it is malformed.
std::string TraceParentOf(const grpc::CallbackServerContext& context);

}  // namespace longspan
