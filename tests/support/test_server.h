#pragma once
// A whole server in this process, on free ports, with the default model; and small clients for it.
#include <google/rpc/error_details.pb.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "longspan/v1/admin.grpc.pb.h"
#include "longspan/v1/attention.grpc.pb.h"
#include "longspan/v1/inference.grpc.pb.h"
#include "server/server.h"

namespace longspan::testing {

// Two threads, free ports, 64 MiB of cache; tests change what they are about.
ServerConfig TestConfig();

class TestServer {
 public:
  explicit TestServer(const ServerConfig& config = TestConfig());
  ~TestServer();  // expects that nothing leaks: the engine becomes idle and its caches are whole

  Server& server() { return *server_; }
  Engine& engine() { return server_->engine(); }
  std::shared_ptr<grpc::Channel> channel() { return channel_; }
  std::unique_ptr<v1::InferenceService::Stub> inference() {
    return v1::InferenceService::NewStub(channel_);
  }
  // A connection of its own, up, so that flow control of one client does not touch others.
  std::shared_ptr<grpc::Channel> NewChannel(grpc::ChannelArguments arguments = {});
  bool shutdown_requested() const { return shutdown_requested_; }

  // grpc.health.v1's answer for a service: 1 SERVING, 2 NOT_SERVING; or minus the status code.
  int Health(const std::string& service);
  // Status line and body of an HTTP answer.
  struct Http {
    int status = 0;
    std::string head, body;
  };
  Http Get(const std::string& path) { return Raw(absl::StrCat("GET ", path, " HTTP/1.0\r\n\r\n")); }
  Http Raw(const std::string& request);
  // The value of one series of /metrics, as in `longspan_requests_running` or `x{a="b"}`; -1:
  // absent.
  double Metric(const std::string& series);

 private:
  std::atomic<bool> shutdown_requested_{false};
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

// Calls any method with the bytes given.
grpc::Status CallRaw(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const std::string& request, std::string* response);

// The detail of type T inside `grpc-status-details-bin`; its default if there is none.
template <class T>
T DetailOf(const grpc::Status& status) {
  google::rpc::Status all;
  T detail;
  if (!all.ParseFromString(status.error_details())) return detail;
  for (const auto& any : all.details()) {
    if (any.Is<T>()) any.UnpackTo(&detail);
  }
  return detail;
}

v1::CompleteRequest Prompt(const std::string& text, int max_tokens);  // greedy, without end of text

}  // namespace longspan::testing
