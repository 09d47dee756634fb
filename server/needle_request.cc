#include "server/needle_request.h"

#include <google/protobuf/util/message_differencer.h>

#include <cmath>
#include <set>
#include <tuple>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/validate.h"

namespace longspan {
namespace {

template <class... Parts>
absl::Status Bad(absl::string_view field, const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", parts...));
}

absl::Status CheckAxes(const v1::RunNeedleRequest& r, int max_context) {
  if (r.context_lengths().empty()) return Bad("context_lengths", "is empty");
  if (r.depth_percents().empty()) return Bad("depth_percents", "is empty");
  if (r.context_lengths_size() > NeedleLimits::kMaxAxis) {
    return Bad("context_lengths", "has ", r.context_lengths_size(), " entries, the limit is ",
               NeedleLimits::kMaxAxis);
  }
  if (r.depth_percents_size() > NeedleLimits::kMaxAxis) {
    return Bad("depth_percents", "has ", r.depth_percents_size(), " entries, the limit is ",
               NeedleLimits::kMaxAxis);
  }
  for (const uint32_t length : r.context_lengths()) {
    if (length == 0) return Bad("context_lengths", "has a 0");
    if (length > static_cast<uint32_t>(max_context)) {
      return WithReason(
          Bad("context_lengths", "has ", length, ", the model's context is ", max_context),
          "CONTEXT_LENGTH_EXCEEDED");
    }
  }
  for (const float depth : r.depth_percents()) {
    if (!(depth >= 0 && depth <= 100)) {
      return Bad("depth_percents", "has ", depth, ", must be from 0 to 100");
    }
  }
  return absl::OkStatus();
}

absl::Status CheckCells(const v1::RunNeedleRequest& r) {
  const uint64_t cells = uint64_t{r.trials()} * r.context_lengths_size() * r.depth_percents_size();
  if (cells > NeedleLimits::kMaxCells) {
    return Bad("trials", "is ", r.trials(), ", which makes ", cells, " cells of ",
               r.context_lengths_size(), " lengths and ", r.depth_percents_size(),
               " depths, the limit is ", NeedleLimits::kMaxCells);
  }
  for (const v1::NeedleCellKey& cell : r.skip_cells()) {
    if (cell.length_index() >= static_cast<uint32_t>(r.context_lengths_size()) ||
        cell.depth_index() >= static_cast<uint32_t>(r.depth_percents_size()) ||
        cell.trial() >= r.trials()) {
      return Bad("skip_cells", "cell (", cell.length_index(), ", ", cell.depth_index(), ", ",
                 cell.trial(), ") is outside the grid of ", r.context_lengths_size(), " x ",
                 r.depth_percents_size(), " x ", r.trials());
    }
  }
  return absl::OkStatus();
}

// Fills in how many keys and values the task has and checks that they suit it.
absl::Status ReadCounts(v1::RunNeedleRequest& r) {
  const bool many_keys =
      r.task() == v1::NEEDLE_TASK_MULTI_KEY || r.task() == v1::NEEDLE_TASK_MULTI_QUERY;
  const bool many_values = r.task() == v1::NEEDLE_TASK_MULTI_VALUE;
  if (r.num_keys() == 0) r.set_num_keys(many_keys ? 4 : 1);
  if (r.num_values() == 0) r.set_num_values(many_values ? 4 : 1);
  const uint32_t most_keys = many_keys ? NeedleLimits::kMaxKeys : 1;
  const uint32_t most_values = r.task() == v1::NEEDLE_TASK_SINGLE ? 1 : NeedleLimits::kMaxValues;
  if (r.num_keys() > most_keys) {
    return Bad("num_keys", "is ", r.num_keys(), ", the limit of ", v1::NeedleTask_Name(r.task()),
               " is ", most_keys);
  }
  if (r.num_values() > most_values) {
    return Bad("num_values", "is ", r.num_values(), ", the limit of ",
               v1::NeedleTask_Name(r.task()), " is ", most_values);
  }
  const uint32_t asked =
      r.num_values() * (r.task() == v1::NEEDLE_TASK_MULTI_QUERY ? r.num_keys() : 1);
  if (asked > RequestLimits::kMaxProbes) {
    return Bad("num_values", "makes ", asked, " values asked for at once, the limit is ",
               RequestLimits::kMaxProbes);
  }
  return absl::OkStatus();
}

absl::Status ReadHaystack(v1::RunNeedleRequest& r) {
  if (!v1::NeedleTask_IsValid(r.task())) {
    return Bad("task", "is ", static_cast<int>(r.task()), ", must be from 0 to ",
               static_cast<int>(v1::NeedleTask_MAX));
  }
  if (!v1::HaystackKind_IsValid(r.haystack())) {
    return Bad("haystack", "is ", static_cast<int>(r.haystack()), ", must be from 0 to ",
               static_cast<int>(v1::HaystackKind_MAX));
  }
  if (r.task() == v1::NEEDLE_TASK_UNSPECIFIED) r.set_task(v1::NEEDLE_TASK_SINGLE);
  if (r.haystack() == v1::HAYSTACK_KIND_UNSPECIFIED) r.set_haystack(v1::HAYSTACK_KIND_ESSAY);
  if (r.haystack_text().empty()) return absl::OkStatus();
  if (r.haystack() != v1::HAYSTACK_KIND_ESSAY) {
    return Bad("haystack_text", "is set, but haystack is ", v1::HaystackKind_Name(r.haystack()));
  }
  if (r.haystack_text().size() > NeedleLimits::kMaxTextBytes) {
    return Bad("haystack_text", "has ", r.haystack_text().size(), " bytes, the limit is ",
               NeedleLimits::kMaxTextBytes);
  }
  if (absl::StripAsciiWhitespace(r.haystack_text()).empty()) {
    return Bad("haystack_text", "holds no text");
  }
  return absl::OkStatus();
}

absl::Status CheckRunId(const std::string& id) {
  if (id.size() > NeedleLimits::kMaxIdBytes) {
    return Bad("run_id", "has ", id.size(), " bytes, the limit is ", NeedleLimits::kMaxIdBytes);
  }
  for (const char c : id) {
    if (!absl::ascii_isalnum(c) && c != '-' && c != '_' && c != '.') {
      return Bad("run_id", "may hold letters, digits, '-', '_' and '.' only");
    }
  }
  return absl::OkStatus();
}

absl::Status ReadRunning(v1::RunNeedleRequest& r, int max_context) {
  if (r.trials() == 0) r.set_trials(1);
  if (r.concurrency() == 0) r.set_concurrency(8);
  if (r.concurrency() > NeedleLimits::kMaxConcurrency) {
    return Bad("concurrency", "is ", r.concurrency(), ", the limit is ",
               NeedleLimits::kMaxConcurrency);
  }
  if (r.max_tokens() > static_cast<uint32_t>(max_context)) {
    return WithReason(
        Bad("max_tokens", "is ", r.max_tokens(), ", the model's context is ", max_context),
        "CONTEXT_LENGTH_EXCEEDED");
  }
  if (r.sampling().n() > 1) return Bad("sampling.n", "is ", r.sampling().n(), ", must be 1");
  if (!r.sampling().has_temperature()) r.mutable_sampling()->set_temperature(0);
  return CheckRunId(r.run_id());
}

}  // namespace

absl::StatusOr<v1::RunNeedleRequest> CompleteNeedleRequest(const v1::RunNeedleRequest& request,
                                                           const ConversionContext& context) {
  v1::RunNeedleRequest r = request;
  if (absl::Status s = CheckModel(r.model(), context); !s.ok()) return s;
  if (r.model().empty()) r.set_model(context.model_names.front());
  if (absl::Status s = CheckAxes(r, context.max_context); !s.ok()) return s;
  if (absl::Status s = ReadHaystack(r); !s.ok()) return s;
  if (absl::Status s = ReadCounts(r); !s.ok()) return s;
  if (absl::Status s = ReadRunning(r, context.max_context); !s.ok()) return s;
  if (absl::Status s = CheckCells(r); !s.ok()) return s;
  // The knobs, on a stand-in for a cell's prompt.
  NeedlePrompt stand_in;
  stand_in.tokens = {0};
  stand_in.max_tokens = 1;
  auto converted = RequestOf(r, stand_in, context);
  if (!converted.ok()) return converted.status();
  const RequestLimits limits = {.vocab = context.spec->vocab, .max_context = context.max_context};
  if (absl::Status s = Validate(*converted, limits); !s.ok()) return s;
  return r;
}

bool SameGrid(const v1::RunNeedleRequest& a, const v1::RunNeedleRequest& b) {
  auto grid = [](v1::RunNeedleRequest r) {
    r.clear_skip_cells();
    r.clear_detach();
    r.clear_concurrency();
    r.clear_priority();
    r.clear_run_id();
    return r;
  };
  return google::protobuf::util::MessageDifferencer::Equals(grid(a), grid(b));
}

Haystack HaystackOf(const v1::RunNeedleRequest& r) {
  switch (r.haystack()) {
    case v1::HAYSTACK_KIND_NOISE:
      return Haystack::kNoise;
    case v1::HAYSTACK_KIND_NEEDLES:
      return Haystack::kNeedles;
    default:
      return Haystack::kEssay;
  }
}

NeedleSpec SpecOf(const v1::RunNeedleRequest& r, const v1::NeedleCellKey& cell) {
  NeedleSpec spec;
  spec.asks_all_keys = r.task() == v1::NEEDLE_TASK_MULTI_QUERY;
  spec.keys = static_cast<int>(r.num_keys());
  spec.values = static_cast<int>(r.num_values());
  spec.context_length = static_cast<int>(r.context_lengths(static_cast<int>(cell.length_index())));
  spec.depth_percent = r.depth_percents(static_cast<int>(cell.depth_index()));
  spec.seed = r.seed();
  spec.trial = cell.trial();
  spec.max_tokens = static_cast<int>(r.max_tokens());
  return spec;
}

std::vector<v1::NeedleCellKey> CellsOf(const v1::RunNeedleRequest& r) {
  std::set<std::tuple<uint32_t, uint32_t, uint32_t>> skipped;
  for (const auto& cell : r.skip_cells()) {
    skipped.insert({cell.length_index(), cell.depth_index(), cell.trial()});
  }
  std::vector<v1::NeedleCellKey> cells;
  for (uint32_t trial = 0; trial < r.trials(); ++trial) {
    for (int length = 0; length < r.context_lengths_size(); ++length) {
      for (int depth = 0; depth < r.depth_percents_size(); ++depth) {
        if (skipped.contains({length, depth, trial})) continue;
        v1::NeedleCellKey& cell = cells.emplace_back();
        cell.set_length_index(length);
        cell.set_depth_index(depth);
        cell.set_trial(trial);
      }
    }
  }
  return cells;
}

absl::StatusOr<Request> RequestOf(const v1::RunNeedleRequest& r, const NeedlePrompt& prompt,
                                  const ConversionContext& context) {
  v1::CompleteRequest complete;
  complete.mutable_token_ids()->mutable_ids()->Add(prompt.tokens.begin(), prompt.tokens.end());
  *complete.mutable_sampling() = r.sampling();
  complete.mutable_stopping()->set_max_tokens(prompt.max_tokens);
  complete.set_priority(r.priority());
  absl::StatusOr<Request> request = ToRequest(complete, context);
  if (request.ok()) request->probes = prompt.values;
  return request;
}

}  // namespace longspan
