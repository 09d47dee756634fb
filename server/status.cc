#include "server/status.h"

#include <optional>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/request.h"
#include "google/rpc/error_details.pb.h"

namespace longspan {
namespace {

// Messages quote what clients send, and travel in headers that clients bound to 8 KiB in all.
constexpr size_t kMaxMessageBytes = 640;

// At most kMaxMessageBytes, cut between characters.
std::string Bounded(absl::string_view message) {
  if (message.size() <= kMaxMessageBytes) return std::string(message);
  size_t end = kMaxMessageBytes;
  while (end > 0 && (static_cast<unsigned char>(message[end]) & 0xc0) == 0x80) --end;
  return absl::StrCat(message.substr(0, end), "…");
}

constexpr int kRetryMilliseconds = 500;  // a queue that is full moves within a few steps

// The field that an InvalidArgument message begins with; empty if it begins with none.
std::string FieldOf(absl::string_view message) {
  const size_t colon = message.find(':');
  if (colon == absl::string_view::npos || colon == 0) return "";
  for (char c : message.substr(0, colon)) {
    const bool part = absl::ascii_islower(c) || absl::ascii_isdigit(c) || c == '_' || c == '.' ||
                      c == '[' || c == ']';
    if (!part) return "";
  }
  return std::string(message.substr(0, colon));
}

constexpr char kRetryMs[] = "longspan/retry-ms";

// When to come again; nullopt where waiting does not help, or for how long is not known.
std::optional<int64_t> RetryMilliseconds(const absl::Status& status) {
  int64_t after = 0;
  if (const auto told = status.GetPayload(kRetryMs); told.has_value()) {
    if (absl::SimpleAtoi(std::string(*told), &after)) return after;
  }
  const auto reason = status.GetPayload(kErrorReason);
  if (reason.has_value() && (*reason == "QUEUE_FULL" || *reason == "KEY_LIMIT")) {
    return kRetryMilliseconds;
  }
  return std::nullopt;
}

}  // namespace

const char* CodeName(const grpc::Status& status) {
  static constexpr const char* kNames[] = {"OK",
                                           "CANCELLED",
                                           "UNKNOWN",
                                           "INVALID_ARGUMENT",
                                           "DEADLINE_EXCEEDED",
                                           "NOT_FOUND",
                                           "ALREADY_EXISTS",
                                           "PERMISSION_DENIED",
                                           "RESOURCE_EXHAUSTED",
                                           "FAILED_PRECONDITION",
                                           "ABORTED",
                                           "OUT_OF_RANGE",
                                           "UNIMPLEMENTED",
                                           "INTERNAL",
                                           "UNAVAILABLE",
                                           "DATA_LOSS",
                                           "UNAUTHENTICATED"};
  const int code = status.error_code();
  return code >= 0 && code < 17 ? kNames[code] : "UNKNOWN";
}

absl::Status WithRetry(absl::Status status, absl::Duration after) {
  const int64_t ms = absl::ToInt64Milliseconds(absl::Ceil(after, absl::Milliseconds(1)));
  status.SetPayload(kRetryMs, absl::Cord(absl::StrCat(ms)));
  return status;
}

grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const std::string message = Bounded(status.message());
  google::rpc::Status details;
  details.set_code(static_cast<int>(status.code()));
  details.set_message(message);
  if (absl::IsInvalidArgument(status)) {
    if (const std::string field = FieldOf(message); !field.empty()) {
      google::rpc::BadRequest bad;
      auto* violation = bad.add_field_violations();
      violation->set_field(field);
      violation->set_description(std::string(
          absl::StripLeadingAsciiWhitespace(absl::string_view(message).substr(field.size() + 1))));
      details.add_details()->PackFrom(bad);
    }
  }
  if (const auto reason = status.GetPayload(kErrorReason); reason.has_value()) {
    google::rpc::ErrorInfo info;
    info.set_reason(std::string(*reason));
    info.set_domain("longspan");
    details.add_details()->PackFrom(info);
  }
  if (const auto after = RetryMilliseconds(status); after.has_value()) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(*after / 1000);
    retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(*after % 1000 * 1'000'000));
    details.add_details()->PackFrom(retry);
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message,
                      details.SerializeAsString());
}

grpc::Status ToGrpc(const absl::Status& status, grpc::CallbackServerContext* context) {
  if (const auto after = RetryMilliseconds(status); after.has_value()) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(*after));
  }
  return ToGrpc(status);
}

}  // namespace longspan
