#include "server/rpc_interceptor.h"

#include <google/protobuf/stubs/logging.h>

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/status.h"

namespace longspan {
namespace {

// What protobuf last complained about on this thread. Parsing and the answer to what did not parse
// happen on one thread, one after the other.
thread_local std::string last_complaint;

void KeepComplaint(google::protobuf::LogLevel, const char*, int, const std::string& message) {
  last_complaint = message;
}

// The 'package.Message.field' that a complaint quotes, without its package and message.
std::string FieldIn(const std::string& complaint) {
  const size_t open = complaint.find('\'');
  const size_t close = complaint.find('\'', open + 1);
  if (open == std::string::npos || close == std::string::npos) return "";
  const std::string name = complaint.substr(open + 1, close - open - 1);
  return name.substr(name.rfind('.') + 1);
}

grpc::Status Unparsable() {
  const std::string field = FieldIn(std::exchange(last_complaint, ""));
  return ToGrpc(absl::InvalidArgumentError(
      field.empty() ? "request: is not a message of this method"
                    : absl::StrCat(field, ": has a string that is not valid UTF-8")));
}

class RpcInterceptor final : public grpc::experimental::Interceptor {
 public:
  RpcInterceptor(Metrics& metrics, const char* method) : metrics_(metrics), method_(method) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      grpc::Status status = methods->GetSendStatus();
      // No handler of ours answers this; gRPC does when a request did not parse.
      if (status.error_code() == grpc::UNIMPLEMENTED && status.error_message().empty()) {
        status = Unparsable();
        methods->ModifySendStatus(status);
      }
      metrics_.CountRpc(std::string(absl::StripPrefix(method_, "/")), CodeName(status));
    }
    methods->Proceed();
  }

 private:
  Metrics& metrics_;
  const char* method_;
};

class RpcInterceptorFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  explicit RpcInterceptorFactory(Metrics& metrics) : metrics_(metrics) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    return new RpcInterceptor(metrics_, info->method());
  }

 private:
  Metrics& metrics_;
};

}  // namespace

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeRpcInterceptor(
    Metrics& metrics) {
  google::protobuf::SetLogHandler(KeepComplaint);
  return std::make_unique<RpcInterceptorFactory>(metrics);
}

}  // namespace longspan
