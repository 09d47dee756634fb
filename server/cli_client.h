#pragma once
// What the client commands share: the channel, JSON of messages, errors as a person wants them.
#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "server/flags.h"
#include "server/tls.h"

namespace longspan::cli {

// Which server, and what it wants to see.
struct Target {
  std::string server = "127.0.0.1:50051";
  std::string api_key;
  ClientTls tls;
  std::string tls_server_name;
};
// Declares --server, --api-key and the --ssl flags. Certificates are read from
// LONGSPAN_CLIENT_SSL_…: beside a server, LONGSPAN_SSL_… are the server's own.
void TargetFlags(Flags& flags, Target* target);
// Declares --model, what a request names; LONGSPAN_CLIENT_MODEL, since LONGSPAN_MODEL is a path.
void ModelFlag(Flags& flags, std::string* model);
// Exits the process with status 2 where the certificate files are not good.
std::shared_ptr<grpc::Channel> Connect(const Target& target);

// Prints code, message, and what the details say about fields and reasons, to stderr; returns 1.
int Fail(const char* command, const grpc::Status& status);
// The message as JSON with the proto's field names. One line unless `pretty`.
std::string ToJson(const google::protobuf::Message& message, bool pretty);

// True if the stream is a terminal that may be coloured: --color=auto honours NO_COLOR.
bool Colour(const std::string& choice, int file_descriptor);
void ColourFlag(Flags& flags, std::string* choice);

// One cell of a heat map: `value` 0..1 as a two-column block of 24-bit colour, or as a digit 0..9
// ('*' for a full 1) without colour. NaN: not known yet.
std::string HeatCell(double value, bool colour);
// The perceptual, colour-blind-safe scale (viridis) at `value` 0..1, as red, green, blue.
struct Rgb {
  int red, green, blue;
};
Rgb HeatColour(double value);

}  // namespace longspan::cli
