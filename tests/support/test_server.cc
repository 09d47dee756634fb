#include "tests/support/test_server.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "gtest/gtest.h"
#include "kernels/check.h"
#include "tests/support/paths.h"

namespace longspan::testing {

ServerConfig TestConfig() {
  ServerConfig config;
  config.model = SourcePath("models/default");
  config.grpc = "127.0.0.1:0";
  config.http = "127.0.0.1:0";
  config.threads = 2;
  config.cache_bytes = 64 << 20;
  config.log_level = "error";
  return config;
}

TestServer::TestServer(const ServerConfig& config) {
  auto started = Server::Start(config, [this] { shutdown_requested_ = true; });
  CHECK(started.ok()) << started.status().ToString();
  server_ = *std::move(started);
  channel_ = NewChannel();
}

TestServer::~TestServer() {
  EXPECT_TRUE(engine().WaitIdle(absl::Seconds(20)));
  const absl::Status whole = engine().CheckIntegrity();
  EXPECT_TRUE(whole.ok()) << whole;
  EXPECT_EQ(engine().Stats().cache.used_bytes, 0);
}

std::shared_ptr<grpc::Channel> TestServer::NewChannel(grpc::ChannelArguments arguments) {
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetMaxSendMessageSize(-1);
  arguments.SetMaxReceiveMessageSize(-1);
  auto channel = grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", server_->grpc_port()),
                                           grpc::InsecureChannelCredentials(), arguments);
  // gRPC 1.51 reads connect()'s errno only after it has allocated memory, which may have set
  // another (glibc's ninth arena leaves ENOENT where /sys is not mounted): the first attempt then
  // fails for nothing and calls that do not wait see UNAVAILABLE. A channel tries again.
  EXPECT_TRUE(
      channel->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(20)));
  return channel;
}

grpc::Status CallRaw(const std::shared_ptr<grpc::Channel>& channel, const std::string& method,
                     const std::string& request, std::string* response) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  grpc::CompletionQueue queue;
  const grpc::Slice slice(request);
  auto call = stub.PrepareUnaryCall(&context, method, grpc::ByteBuffer(&slice, 1), &queue);
  grpc::ByteBuffer answer;
  grpc::Status status;
  call->StartCall();
  call->Finish(&answer, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  std::vector<grpc::Slice> slices;
  if (status.ok() && answer.Dump(&slices).ok()) {
    for (const auto& part : slices) {
      response->append(reinterpret_cast<const char*>(part.begin()), part.size());
    }
  }
  return status;
}

int TestServer::Health(const std::string& service) {
  // HealthCheckRequest{string service = 1}, HealthCheckResponse{enum status = 1}.
  std::string request, response;
  if (!service.empty()) request = absl::StrCat("\n", std::string(1, service.size()), service);
  const grpc::Status status = CallRaw(channel_, "/grpc.health.v1.Health/Check", request, &response);
  if (!status.ok()) return -static_cast<int>(status.error_code());
  return response.size() == 2 ? response[1] : 0;
}

TestServer::Http TestServer::Raw(const std::string& request) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(server_->http_port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  CHECK_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  size_t sent = 0;
  while (sent < request.size()) {
    const ssize_t n = send(fd, request.data() + sent, request.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) break;  // the server may refuse a long request before its end
    sent += n;
  }
  std::string all;
  char buffer[65536];
  for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0;) all.append(buffer, n);
  close(fd);
  Http answer;
  const std::pair<std::string, std::string> parts =
      absl::StrSplit(all, absl::MaxSplits("\r\n\r\n", 1));
  answer.head = parts.first;
  answer.body = parts.second;
  const std::vector<std::string> words = absl::StrSplit(answer.head, ' ');
  if (words.size() > 1) (void)absl::SimpleAtoi(words[1], &answer.status);
  return answer;
}

double TestServer::Metric(const std::string& series) {
  for (absl::string_view line : absl::StrSplit(Get("/metrics").body, '\n')) {
    double value = 0;
    if (absl::StartsWith(line, absl::StrCat(series, " ")) &&
        absl::SimpleAtod(line.substr(series.size() + 1), &value)) {
      return value;
    }
  }
  return -1;
}

v1::CompleteRequest Prompt(const std::string& text, int max_tokens) {
  v1::CompleteRequest request;
  request.set_text(text);
  request.mutable_sampling()->set_temperature(0);
  request.mutable_stopping()->set_max_tokens(max_tokens);
  request.mutable_stopping()->set_ignore_eos(true);
  return request;
}

}  // namespace longspan::testing
