#include "server/trace_parent.h"

#include "absl/strings/ascii.h"

namespace longspan {
namespace {

bool IsHex(absl::string_view text) {
  for (char c : text) {
    if (!absl::ascii_isdigit(c) && (c < 'a' || c > 'f')) return false;
  }
  return true;
}

bool IsZero(absl::string_view text) {
  return text.find_first_not_of('0') == absl::string_view::npos;
}

}  // namespace

bool IsTraceParent(absl::string_view value) {
  constexpr size_t kLength = 55;
  if (value.size() < kLength) return false;
  const absl::string_view version = value.substr(0, 2), trace = value.substr(3, 32),
                          parent = value.substr(36, 16), flags = value.substr(53, 2);
  if (value[2] != '-' || value[35] != '-' || value[52] != '-') return false;
  if (!IsHex(version) || !IsHex(trace) || !IsHex(parent) || !IsHex(flags)) return false;
  if (IsZero(trace) || IsZero(parent) || version == "ff") return false;
  if (value.size() == kLength) return true;
  return version != "00" && value[kLength] == '-' && value.size() <= 256;
}

std::string TraceParentOf(const grpc::CallbackServerContext& context) {
  const auto& metadata = context.client_metadata();
  const auto [begin, end] = metadata.equal_range("traceparent");
  if (begin == end || std::next(begin) != end) return "";
  const absl::string_view value(begin->second.data(), begin->second.size());
  return IsTraceParent(value) ? std::string(value) : "";
}

}  // namespace longspan
