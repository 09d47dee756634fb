#include "server/cli_client.h"

#include <google/protobuf/util/json_util.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "google/rpc/error_details.pb.h"
#include "server/status.h"

namespace longspan::cli {

namespace {

// Every call of a channel carries the key. Call credentials would not do: gRPC sends those over TLS
// only, and a server behind a proxy or on loopback has none.
class KeySender final : public grpc::experimental::Interceptor {
 public:
  explicit KeySender(const std::string& key) : value_("Bearer " + key) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->insert({"authorization", value_});
    }
    methods->Proceed();
  }

 private:
  const std::string value_;
};

class KeySenderFactory final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit KeySenderFactory(std::string key) : key_(std::move(key)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(
      grpc::experimental::ClientRpcInfo*) override {
    return new KeySender(key_);
  }

 private:
  const std::string key_;
};

}  // namespace

void TargetFlags(Flags& flags, Target* target) {
  flags.String("server", &target->server, "HOST:PORT", "the server's gRPC address");
  flags.String(
      "api-key", &target->api_key, "KEY",
      "for servers that ask for one; better in LONGSPAN_API_KEY, where ps does not show it");
  flags.Bool("tls", &target->tls.on, "connect over TLS; the --ssl files imply it");
  flags.String("ssl-ca-certs", &target->tls.ca_certs, "FILE",
               "who signs the server's certificate; else those whom the system trusts");
  flags.String("ssl-certfile", &target->tls.certfile, "FILE", "for servers that ask for one");
  flags.String("ssl-keyfile", &target->tls.keyfile, "FILE", "its private key");
  flags.String("tls-server-name", &target->tls_server_name, "NAME",
               "what the server's certificate says, if not the host of --server");
  flags.Variable("ssl-ca-certs", "LONGSPAN_CLIENT_SSL_CA_CERTS");
  flags.Variable("ssl-certfile", "LONGSPAN_CLIENT_SSL_CERTFILE");
  flags.Variable("ssl-keyfile", "LONGSPAN_CLIENT_SSL_KEYFILE");
}

void ModelFlag(Flags& flags, std::string* model) {
  flags.String("model", model, "NAME", "which model; empty is the served one");
  flags.Variable("model", "LONGSPAN_CLIENT_MODEL");
}

std::shared_ptr<grpc::Channel> Connect(const Target& target) {
  auto credentials = CredentialsOf(target.tls);
  if (!credentials.ok()) {
    std::cerr << "longspan: " << credentials.status().message() << "\n";
    std::exit(2);
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  if (!target.tls_server_name.empty()) {
    arguments.SetString(GRPC_SSL_TARGET_NAME_OVERRIDE_ARG, target.tls_server_name);
  }
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  if (!target.api_key.empty()) {
    interceptors.push_back(std::make_unique<KeySenderFactory>(target.api_key));
  }
  return grpc::experimental::CreateCustomChannelWithInterceptors(
      target.server, *credentials, arguments, std::move(interceptors));
}

int Fail(const char* command, const grpc::Status& status) {
  const int code = status.error_code();
  std::cerr << "longspan " << command << ": " << CodeName(status) << ": " << status.error_message()
            << "\n";
  google::rpc::Status details;
  if (details.ParseFromString(status.error_details())) {
    for (const auto& any : details.details()) {
      google::rpc::BadRequest bad;
      google::rpc::ErrorInfo info;
      if (any.UnpackTo(&bad)) {
        for (const auto& v : bad.field_violations()) {
          std::cerr << "  field " << v.field() << ": " << v.description() << "\n";
        }
      } else if (any.UnpackTo(&info)) {
        std::cerr << "  reason " << info.reason() << "\n";
      }
    }
  }
  // A server that answers UNAVAILABLE sends details; a connection that fails has none.
  if (code == grpc::StatusCode::UNAVAILABLE && status.error_details().empty()) {
    std::cerr << "  is a server running there? start one with: longspan serve\n";
  }
  return 1;
}

std::string ToJson(const google::protobuf::Message& message, bool pretty) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  options.add_whitespace = pretty;
  std::string json;
  if (!google::protobuf::util::MessageToJsonString(message, &json, options).ok()) return "{}";
  while (!json.empty() && json.back() == '\n') json.pop_back();
  return json;
}

void ColourFlag(Flags& flags, std::string* choice) {
  flags.Choice("color", choice, {"auto", "always", "never"}, "colour; auto is on a terminal only");
}

bool Colour(const std::string& choice, int file_descriptor) {
  if (choice != "auto") return choice == "always";
  const char* no_color = std::getenv("NO_COLOR");
  return isatty(file_descriptor) == 1 && (no_color == nullptr || *no_color == '\0');
}

Rgb HeatColour(double value) {
  // Nine points of the viridis colour map (CC0), linear in between.
  static constexpr Rgb kPoints[] = {{68, 1, 84},    {71, 44, 122},  {59, 81, 139},
                                    {44, 113, 142}, {33, 144, 141}, {39, 173, 129},
                                    {92, 200, 99},  {170, 220, 50}, {253, 231, 37}};
  const double x = std::clamp(value, 0.0, 1.0) * 8;
  const int i = std::min(7, static_cast<int>(x));
  const double f = x - i;
  auto mix = [&](int a, int b) { return static_cast<int>(std::lround(a + f * (b - a))); };
  return {mix(kPoints[i].red, kPoints[i + 1].red), mix(kPoints[i].green, kPoints[i + 1].green),
          mix(kPoints[i].blue, kPoints[i + 1].blue)};
}

std::string HeatCell(double value, bool colour) {
  if (std::isnan(value)) return " .";
  if (!colour) {
    const int digit = static_cast<int>(std::floor(std::clamp(value, 0.0, 1.0) * 10));
    return digit >= 10 ? " *" : absl::StrCat(" ", digit);
  }
  const Rgb c = HeatColour(value);
  return absl::StrFormat("\033[48;2;%d;%d;%dm  \033[0m", c.red, c.green, c.blue);
}

}  // namespace longspan::cli
