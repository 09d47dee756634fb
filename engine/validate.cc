#include "engine/validate.h"

#include <cmath>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

template <class... Parts>
absl::Status Bad(absl::string_view field, const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", parts...));
}

// lowest <= value <= highest; NaN fails.
template <class T>
absl::Status InRange(absl::string_view field, T value, T lowest, T highest) {
  if (value >= lowest && value <= highest) return absl::OkStatus();
  return Bad(field, "is ", value, ", must be from ", lowest, " to ", highest);
}

// 0 < value <= highest; NaN fails.
absl::Status AboveZero(absl::string_view field, float value, float highest) {
  if (value > 0 && value <= highest) return absl::OkStatus();
  return Bad(field, "is ", value, ", must be above 0 and at most ", highest);
}

absl::Status AtMost(absl::string_view field, size_t count, size_t limit, absl::string_view what) {
  if (count <= limit) return absl::OkStatus();
  return Bad(field, "has ", count, " ", what, ", the limit is ", limit);
}

absl::Status IsToken(absl::string_view field, int64_t id, int vocab) {
  if (id >= 0 && id < vocab) return absl::OkStatus();
  return Bad(field, "token id ", id, " is not in the vocabulary of ", vocab);
}

bool IsUtf8(absl::string_view text) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const int more = lead < 0x80   ? 0
                     : lead < 0xc2 ? -1
                     : lead < 0xe0 ? 1
                     : lead < 0xf0 ? 2
                     : lead < 0xf5 ? 3
                                   : -1;
    if (more < 0 || i + more >= text.size()) return false;
    uint32_t code = more == 0 ? lead : lead & (0x3f >> more);
    for (int k = 1; k <= more; ++k) {
      const auto next = static_cast<unsigned char>(text[i + k]);
      if ((next & 0xc0) != 0x80) return false;
      code = (code << 6) | (next & 0x3f);
    }
    const bool overlong = (more == 2 && code < 0x800) || (more == 3 && code < 0x10000);
    if (overlong || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return false;
    i += more + 1;
  }
  return true;
}

absl::Status ValidateSampling(const SamplingParams& p, int vocab) {
  if (auto s = InRange<float>("sampling.temperature", p.temperature, 0, 100); !s.ok()) return s;
  if (auto s = InRange<int64_t>("sampling.top_k", p.top_k, 0, 1 << 30); !s.ok()) return s;
  if (auto s = AboveZero("sampling.top_p", p.top_p, 1); !s.ok()) return s;
  if (auto s = InRange<float>("sampling.min_p", p.min_p, 0, 1); !s.ok()) return s;
  if (auto s = InRange<float>("sampling.presence_penalty", p.presence_penalty, -2, 2); !s.ok())
    return s;
  if (auto s = InRange<float>("sampling.frequency_penalty", p.frequency_penalty, -2, 2); !s.ok())
    return s;
  if (auto s = AboveZero("sampling.repetition_penalty", p.repetition_penalty, 2); !s.ok()) return s;
  if (auto s =
          AtMost("sampling.logit_bias", p.logit_bias.size(), RequestLimits::kMaxBiases, "entries");
      !s.ok()) {
    return s;
  }
  for (const auto& [token, bias] : p.logit_bias) {
    if (auto s = IsToken("sampling.logit_bias", token, vocab); !s.ok()) return s;
    if (auto s = InRange<float>(absl::StrCat("sampling.logit_bias[", token, "]"), bias, -100, 100);
        !s.ok()) {
      return s;
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateStopping(const StoppingParams& p, int vocab) {
  if (p.max_tokens < 1)
    return Bad("stopping.max_tokens", "is ", p.max_tokens, ", must be at least 1");
  if (auto s = InRange<int64_t>("stopping.min_tokens", p.min_tokens, 0, p.max_tokens); !s.ok())
    return s;
  if (auto s = AtMost("stopping.stop", p.stop.size(), RequestLimits::kMaxStops, "strings");
      !s.ok()) {
    return s;
  }
  for (size_t i = 0; i < p.stop.size(); ++i) {
    const std::string field = absl::StrCat("stopping.stop[", i, "]");
    if (p.stop[i].empty()) return Bad(field, "is empty");
    if (auto s = AtMost(field, p.stop[i].size(), RequestLimits::kMaxStopBytes, "bytes"); !s.ok()) {
      return s;
    }
    if (!IsUtf8(p.stop[i])) return Bad(field, "is not valid UTF-8");
  }
  if (auto s = AtMost("stopping.stop_token_ids", p.stop_token_ids.size(),
                      RequestLimits::kMaxStopIds, "ids");
      !s.ok()) {
    return s;
  }
  for (int64_t id : p.stop_token_ids) {
    if (auto s = IsToken("stopping.stop_token_ids", id, vocab); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status ValidatePrompt(const Request& request, const RequestLimits& limits) {
  if (request.prompt.empty()) return Bad("prompt", "has no tokens");
  for (int32_t token : request.prompt) {
    if (auto s = IsToken("prompt", token, limits.vocab); !s.ok()) return s;
  }
  const int64_t wanted = static_cast<int64_t>(request.prompt.size()) + request.stopping.max_tokens;
  if (wanted > limits.max_context) {
    return WithReason(Bad("prompt", "has ", request.prompt.size(), " tokens and max_tokens is ",
                          request.stopping.max_tokens, ", ", wanted,
                          " together; the context holds ", limits.max_context),
                      "CONTEXT_LENGTH_EXCEEDED");
  }
  if (auto s = AtMost("probes", request.probes.size(), RequestLimits::kMaxProbes, "ranges");
      !s.ok()) {
    return s;
  }
  for (const ProbeRange& range : request.probes) {
    if (range.begin < 0 || range.begin > range.end ||
        range.end > static_cast<int64_t>(request.prompt.size())) {
      return Bad("probes", "range [", range.begin, ", ", range.end,
                 ") is not inside the prompt of ", request.prompt.size(), " tokens");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status WithReason(absl::Status status, absl::string_view reason) {
  status.SetPayload(kErrorReason, absl::Cord(reason));
  return status;
}

absl::Status Validate(const Request& request, const RequestLimits& limits) {
  if (request.id.empty()) return Bad("request_id", "is empty");
  if (auto s = InRange<int64_t>("sampling.n", request.n, 1, RequestLimits::kMaxChoices); !s.ok())
    return s;
  if (auto s = ValidateSampling(request.sampling, limits.vocab); !s.ok()) return s;
  if (auto s = ValidateStopping(request.stopping, limits.vocab); !s.ok()) return s;
  for (const auto& [field, value] :
       {std::pair{"output.logprobs", request.output.logprobs},
        std::pair{"output.prompt_logprobs", request.output.prompt_logprobs}}) {
    if (auto s = InRange<int64_t>(field, value.value_or(0), 0, RequestLimits::kMaxLogprobs);
        !s.ok()) {
      return s;
    }
  }
  return ValidatePrompt(request, limits);
}

}  // namespace longspan
