#pragma once
// What the client commands share: the channel, JSON of messages, errors as a person wants them.
#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "server/flags.h"

namespace longspan::cli {

// Declares --server (and LONGSPAN_SERVER) with the default address.
void ServerFlag(Flags& flags, std::string* server);
std::shared_ptr<grpc::Channel> Connect(const std::string& server);

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
