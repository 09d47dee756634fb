#include "server/cli_client.h"

#include <google/protobuf/util/json_util.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "google/rpc/error_details.pb.h"
#include "server/status.h"

namespace longspan::cli {

void ServerFlag(Flags& flags, std::string* server) {
  flags.String("server", server, "HOST:PORT", "the server's gRPC address");
}

std::shared_ptr<grpc::Channel> Connect(const std::string& server) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  return grpc::CreateCustomChannel(server, grpc::InsecureChannelCredentials(), arguments);
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
  if (code == grpc::StatusCode::UNAVAILABLE) {
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
