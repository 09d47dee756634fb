#include "server/rpc_interceptor.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/stubs/logging.h>
#include <grpc/grpc.h>
#include <grpcpp/grpcpp.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
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

// The 'package.Message.field' that a complaint quotes.
absl::string_view QuotedIn(absl::string_view complaint) {
  const size_t open = complaint.find('\'');
  const size_t close = complaint.find('\'', open + 1);
  if (open == absl::string_view::npos || close == absl::string_view::npos) return "";
  return complaint.substr(open + 1, close - open - 1);
}

// The shortest way from a message to a field of it or of what it holds: "stopping.stop".
std::string PathTo(absl::string_view field, const google::protobuf::Descriptor& message) {
  std::vector<std::pair<const google::protobuf::Descriptor*, std::string>> queue = {{&message, ""}};
  absl::flat_hash_set<const google::protobuf::Descriptor*> seen = {&message};
  for (size_t next = 0; next < queue.size(); ++next) {
    const auto [type, prefix] = queue[next];
    for (int i = 0; i < type->field_count(); ++i) {
      const google::protobuf::FieldDescriptor& f = *type->field(i);
      if (f.full_name() == field) return absl::StrCat(prefix, f.name());
      if (f.message_type() != nullptr && seen.insert(f.message_type()).second) {
        queue.emplace_back(f.message_type(), absl::StrCat(prefix, f.name(), "."));
      }
    }
  }
  return "";
}

// method: "longspan.v1.InferenceService/Complete". nullptr: nothing of that name is served.
const google::protobuf::MethodDescriptor* FindMethod(absl::string_view method) {
  return google::protobuf::DescriptorPool::generated_pool()->FindMethodByName(
      absl::StrReplaceAll(method, {{"/", "."}}));
}

grpc::Status Unparsable(const google::protobuf::MethodDescriptor& method) {
  const std::string path =
      PathTo(QuotedIn(std::exchange(last_complaint, "")), *method.input_type());
  // A stream's message holds the unary call's; every refusal names that one's fields.
  const absl::string_view field = absl::StripPrefix(path, "request.");
  return ToGrpc(absl::InvalidArgumentError(
      field.empty() ? "request: is not a message of this method"
                    : absl::StrCat(field, ": has a string that is not valid UTF-8")));
}

class RpcInterceptor final : public grpc::experimental::Interceptor {
 public:
  // context: of a service that asks for no key itself, or nullptr.
  RpcInterceptor(Metrics& metrics, Access& access, absl::string_view method,
                 grpc::ServerContext* context)
      : metrics_(metrics),
        access_(access),
        method_(absl::StripPrefix(method, "/")),
        context_(context) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using grpc::experimental::InterceptionHookPoints;
    if (context_ != nullptr &&
        methods->QueryInterceptionHookPoint(InterceptionHookPoints::POST_RECV_INITIAL_METADATA)) {
      Authenticate(*methods->GetRecvInitialMetadata());
    }
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_STATUS)) {
      grpc::Status status = methods->GetSendStatus();
      const auto* known = FindMethod(method_);
      // No handler of ours answers this; gRPC does when a request did not parse, or for a method
      // that it does not know.
      if (known != nullptr && status.error_code() == grpc::UNIMPLEMENTED &&
          status.error_message().empty()) {
        status = Unparsable(*known);
        methods->ModifySendStatus(status);
      }
      if (!caller_.ok()) status = ToGrpc(caller_);  // sent already
      // One name for all that clients make up: a series each would never end.
      metrics_.CountRpc(known != nullptr ? absl::string_view(method_) : "unknown",
                        CodeName(status));
    }
    methods->Proceed();
  }

 private:
  // The handler runs all the same; its call has ended before, and nobody hears what it says.
  void Authenticate(const std::multimap<grpc::string_ref, grpc::string_ref>& metadata) {
    const auto found = metadata.find("authorization");
    const absl::string_view authorization =
        found == metadata.end() ? ""
                                : absl::string_view(found->second.data(), found->second.size());
    caller_ = access_.Authenticate(authorization, Role::kUser).status();
    if (caller_.ok()) return;
    grpc_call_cancel_with_status(context_->c_call(), GRPC_STATUS_UNAUTHENTICATED,
                                 std::string(caller_.message()).c_str(), nullptr);
  }

  Metrics& metrics_;
  Access& access_;
  const std::string method_;
  grpc::ServerContext* const context_;
  absl::Status caller_;
};

bool AsksForItself(absl::string_view method) {
  return absl::StartsWith(method, "/longspan.v1.") || absl::StartsWith(method, "/grpc.health.v1.");
}

class RpcInterceptorFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  RpcInterceptorFactory(Metrics& metrics, Access& access) : metrics_(metrics), access_(access) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    // Reflection is a service of the synchronous API, which has this context.
    auto* context = AsksForItself(info->method())
                        ? nullptr
                        : static_cast<grpc::ServerContext*>(info->server_context());
    return new RpcInterceptor(metrics_, access_, info->method(), context);
  }

 private:
  Metrics& metrics_;
  Access& access_;
};

}  // namespace

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeRpcInterceptor(
    Metrics& metrics, Access& access) {
  google::protobuf::SetLogHandler(KeepComplaint);
  return std::make_unique<RpcInterceptorFactory>(metrics, access);
}

}  // namespace longspan
