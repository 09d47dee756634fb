#pragma once
// What goes into the engine and what comes out: requests, knobs, events. Plain values. Counts and
// token ids are wide enough for whatever a client may ask, so that a refusal can tell it.
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/span_record.h"

namespace longspan {

// Payload of an error status: a machine-readable reason, such as CONTEXT_LENGTH_EXCEEDED,
// QUEUE_FULL or NEVER_FITS.
inline constexpr char kErrorReason[] = "longspan/reason";
absl::Status WithReason(absl::Status status, absl::string_view reason);

struct SamplingParams {
  float temperature = 1;                              // 0: greedy
  int64_t top_k = 0;                                  // 0: off
  float top_p = 1;                                    // (0, 1]
  float min_p = 0;                                    // [0, 1]
  float presence_penalty = 0;                         // [-2, 2]
  float frequency_penalty = 0;                        // [-2, 2]
  float repetition_penalty = 1;                       // (0, 2]; over prompt and output
  std::optional<uint64_t> seed;                       // unset: drawn at random by Engine::Submit
  std::vector<std::pair<int64_t, float>> logit_bias;  // by token; [-100, 100] each
};

struct StoppingParams {
  int64_t max_tokens = 16;
  int64_t min_tokens = 0;         // eos, stop ids and stop strings do not end it before
  std::vector<std::string> stop;  // valid UTF-8, not empty
  std::vector<int64_t> stop_token_ids;
  bool ignore_eos = false;
  bool include_stop_in_output = false;
};

struct OutputParams {
  std::optional<int64_t> logprobs;         // chosen token plus this many of the top; 0..20
  std::optional<int64_t> prompt_logprobs;  // the same for each prompt token
  bool skip_special_tokens = true;
  bool attention_spans = false;  // collect this request's own spans (every step observed)
};

struct Request {
  std::string id;               // unique among those in flight
  std::vector<int32_t> prompt;  // not empty; ids < vocab
  SamplingParams sampling;
  StoppingParams stopping;
  OutputParams output;
  int64_t n = 1;     // choices
  int priority = 0;  // larger first
  absl::Time deadline = absl::InfiniteFuture();
  std::vector<ProbeRange> probes;  // needle positions in the prompt: their mass is reported per
                                   // head for the row that yields the first output token
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
  int rank = 1;                   // 1: the most likely
  std::vector<TokenLogprob> top;  // most likely first; empty inside `top` itself
};

enum class FinishReason : uint8_t { kNone, kStop, kLength, kCancelled };

// Sums over observed queries, per layer and query head. [layers][heads].
struct HeadSums {
  double queries = 0, far_mass = 0, sink_mass = 0, sink_queries = 0, distance = 0, entropy = 0,
         top_probability = 0, copy_hits = 0, probe_mass = 0, beyond_window = 0;
  double mass_by_distance[kDistanceBuckets] = {};
};
struct SpanSums {
  int layers = 0, heads = 0;   // heads: the most of any layer
  std::vector<HeadSums> sums;  // layers * heads
  HeadSums& at(int layer, int head) { return sums[layer * heads + head]; }
  const HeadSums& at(int layer, int head) const { return sums[layer * heads + head]; }
};

struct Timings {
  absl::Duration queued, prefill, time_to_first_token, decode;
};

// One thing that happened to a request. Events of a request come in order, from the engine thread.
struct Event {
  enum class Kind : uint8_t { kPrompt, kDelta, kFinished };
  Kind kind = Kind::kDelta;

  // kPrompt: once, first, when the prompt has been read (only if prompt_logprobs were asked for,
  // they are in `logprobs`: entry i describes prompt token i; entry 0 is empty). kDelta: the next
  // token of choice `index`. `text` may lag behind `token` while a character or a possible stop
  // string is incomplete.
  int index = 0;
  std::optional<int32_t> token;  // none: the sequence ended for an outside reason
  std::string text;
  std::vector<TokenLogprob> logprobs;
  FinishReason finish = FinishReason::kNone;  // on this index's last delta
  std::optional<std::string> stop_text;       // what stopped it, if finish == kStop
  std::optional<int32_t> stop_token;
  bool stop_is_eos = false;

  // kFinished: exactly once, last. OK, or CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE, INTERNAL.
  absl::Status status;
  int prompt_tokens = 0, completion_tokens = 0, cached_prompt_tokens = 0;
  Timings timings;
  std::optional<SpanSums> spans;               // if asked for
  std::vector<std::vector<float>> probe_mass;  // [layers][heads], if probes were given
};

// Called on the engine thread; must not block. Owned by the engine until kFinished has been
// delivered.
using EventSink = absl::AnyInvocable<void(Event)>;

}  // namespace longspan
