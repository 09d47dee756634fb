#include "server/needle_run.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "server/log.h"
#include "server/needle_report.h"
#include "server/needle_request.h"
#include "server/span_proto.h"

namespace longspan {
namespace {

constexpr absl::Duration kFirstRetry = absl::Milliseconds(20);
constexpr absl::Duration kLongestRetry = absl::Seconds(1);

// The engine's queue is full, or the key has what it may for now.
bool PassesByWaiting(const absl::Status& status) {
  const auto reason = status.GetPayload(kErrorReason);
  return reason.has_value() && (*reason == "QUEUE_FULL" || *reason == "KEY_LIMIT");
}

// Head masses of every layer, if asked for, and the largest of all.
void SetMass(const std::vector<std::vector<float>>& mass, const ModelSpec& spec, bool layers,
             v1::NeedleCell& cell) {
  float largest = 0;
  for (size_t layer = 0; layer < mass.size(); ++layer) {
    for (const float m : mass[layer]) largest = std::max(largest, m);
    if (!layers) continue;
    v1::LayerNeedleMass* out = cell.add_layers();
    out->set_layer(static_cast<uint32_t>(layer));
    out->set_kind(KindOf(spec.layers[layer]));
    out->mutable_head_mass()->Add(mass[layer].begin(), mass[layer].end());
  }
  cell.set_needle_attention_ratio(largest);
}

}  // namespace

NeedleRun::NeedleRun(const Frontend& frontend, Caller caller, v1::RunNeedleRequest request,
                     std::shared_ptr<const NeedlePrompter> prompter, OnScore on_score,
                     OnMass on_mass)
    : frontend_(frontend),
      caller_(std::move(caller)),
      request_(std::move(request)),
      prompter_(std::move(prompter)),
      on_score_(std::move(on_score)),
      on_mass_(std::move(on_mass)),
      cells_(CellsOf(request_)),
      scores_(static_cast<size_t>(request_.context_lengths_size()) *
              request_.depth_percents_size()) {
  v1::RunNeedleResponse event;
  v1::NeedleStarted* started = event.mutable_started();
  started->set_run_id(id());
  started->set_total_cells(static_cast<uint32_t>(cells_.size()));
  *started->mutable_context_lengths() = request_.context_lengths();
  *started->mutable_depth_percents() = request_.depth_percents();
  absl::MutexLock lock(&mu_);
  AppendLocked(std::move(event));
}

NeedleRun::~NeedleRun() {
  // The last watcher may let go of the run on the run's own thread, as the last thing it does.
  if (thread_.get_id() == std::this_thread::get_id()) {
    thread_.detach();
  } else {
    Join();
  }
}

void NeedleRun::Start() {
  thread_ = std::thread([this] { Loop(); });
}

void NeedleRun::Join() {
  if (thread_.joinable()) thread_.join();
}

void NeedleRun::Cancel() {
  std::set<std::string> in_flight;
  {
    absl::MutexLock lock(&mu_);
    if (finished_) return;
    cancelled_ = true;
    in_flight = in_flight_;
  }
  for (const std::string& id : in_flight) frontend_.engine.Cancel(id);
}

void NeedleRun::Attach(std::shared_ptr<Watcher> watcher) {
  absl::MutexLock lock(&mu_);
  watchers_.push_back(std::move(watcher));
}

void NeedleRun::Detach(const Watcher* watcher) {
  std::shared_ptr<Watcher> leaving;  // released outside the lock
  bool abandoned = false;
  {
    absl::MutexLock lock(&mu_);
    const auto it = std::find_if(watchers_.begin(), watchers_.end(),
                                 [&](const auto& w) { return w.get() == watcher; });
    if (it == watchers_.end()) return;
    leaving = std::move(*it);
    watchers_.erase(it);
    abandoned = watchers_.empty() && !finished_ && !request_.detach();
  }
  if (abandoned) Cancel();
}

std::optional<v1::RunNeedleResponse> NeedleRun::EventAt(size_t i) const {
  absl::MutexLock lock(&mu_);
  if (i >= log_.size()) return std::nullopt;
  return log_[i];
}

bool NeedleRun::EndsAt(size_t i) const {
  absl::MutexLock lock(&mu_);
  return finished_ && i >= log_.size();
}

bool NeedleRun::finished() const {
  absl::MutexLock lock(&mu_);
  return finished_;
}

v1::NeedleRun NeedleRun::Snapshot(bool with_cells) const {
  v1::NeedleRun run;
  run.set_run_id(id());
  *run.mutable_request() = request_;
  absl::MutexLock lock(&mu_);
  *run.mutable_summary() = SummaryLocked();
  for (const v1::RunNeedleResponse& event : log_) {
    if (with_cells && event.has_cell()) *run.add_cells() = event.cell();
  }
  return run;
}

void NeedleRun::Loop() {
  for (const v1::NeedleCellKey& cell : cells_) {
    if (!WaitForPlace() || !Submit(cell)) break;
  }
  {
    absl::MutexLock lock(&mu_);
    auto idle = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return in_flight_.empty(); };
    mu_.Await(absl::Condition(&idle));
  }
  Finish();
}

// False when the run is to end.
bool NeedleRun::WaitForPlace() {
  absl::MutexLock lock(&mu_);
  auto place = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return cancelled_ || in_flight_.size() < request_.concurrency();
  };
  mu_.Await(absl::Condition(&place));
  return !cancelled_;
}

v1::NeedleCell NeedleRun::CellOf(const v1::NeedleCellKey& key) const {
  v1::NeedleCell cell;
  cell.set_length_index(key.length_index());
  cell.set_depth_index(key.depth_index());
  cell.set_trial(key.trial());
  cell.set_context_length(request_.context_lengths(static_cast<int>(key.length_index())));
  cell.set_depth_percent(request_.depth_percents(static_cast<int>(key.depth_index())));
  return cell;
}

// Brings one cell into the engine, waiting where that helps. False when the run is to end.
bool NeedleRun::Submit(const v1::NeedleCellKey& key) {
  v1::NeedleCell cell = CellOf(key);
  absl::StatusOr<NeedlePrompt> prompt = prompter_->Build(SpecOf(request_, key));
  if (!prompt.ok()) {
    cell.set_error(std::string(prompt.status().message()));
    Record(std::move(cell), "");
    return true;
  }
  cell.set_prompt_tokens(static_cast<uint32_t>(prompt->tokens.size()));
  cell.set_expected(absl::StrJoin(prompt->expected, ", "));
  cell.set_needle_token_begin(prompt->values[0].begin);
  cell.set_needle_token_end(prompt->values[0].end);
  for (absl::Duration pause = kFirstRetry;; pause = std::min(2 * pause, kLongestRetry)) {
    const absl::Status status = SubmitOnce(cell, *prompt);
    if (status.ok()) return true;
    if (absl::IsUnavailable(status)) {
      absl::MutexLock lock(&mu_);
      refused_ = true;
      return false;
    }
    if (!PassesByWaiting(status)) {
      cell.set_error(absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message()));
      Record(std::move(cell), "");
      return true;
    }
    absl::MutexLock lock(&mu_);
    if (mu_.AwaitWithTimeout(absl::Condition(&cancelled_), pause)) return false;
  }
}

absl::Status NeedleRun::SubmitOnce(const v1::NeedleCell& cell, const NeedlePrompt& prompt) {
  absl::StatusOr<Request> request = RequestOf(request_, prompt, frontend_.conversion);
  if (!request.ok()) return request.status();
  const std::string id = absl::StrCat(this->id(), "/", cell.length_index(), "-", cell.depth_index(),
                                      "-", cell.trial());
  request->id = id;
  {
    absl::MutexLock lock(&mu_);
    if (cancelled_) return absl::OkStatus();
    in_flight_.insert(id);
  }
  auto lease = caller_.Begin(id, static_cast<int64_t>(request->prompt.size()));
  if (!lease.ok()) {
    absl::MutexLock lock(&mu_);
    in_flight_.erase(id);
    return lease.status();
  }
  const absl::Time begin = absl::Now();
  auto sink = [self = shared_from_this(), cell = v1::NeedleCell(cell), expected = prompt.expected,
               lease = *std::move(lease), id, begin, answer = std::string()](Event event) mutable {
    if (event.kind == Event::Kind::kDelta) answer += event.text;
    if (event.kind != Event::Kind::kFinished) return;
    lease.Charge(event.completion_tokens);
    if (event.status.ok()) {
      cell.set_score(static_cast<float>(ScoreAnswer(answer, expected)));
      cell.set_ttft_seconds(absl::ToDoubleSeconds(event.timings.time_to_first_token));
      SetMass(event.probe_mass, *self->frontend_.conversion.spec,
              self->request_.record_attention_spans(), cell);
      self->AddMass(cell, event.probe_mass);
    } else {
      cell.set_error(absl::StrCat(absl::StatusCodeToString(event.status.code()), ": ",
                                  event.status.message()));
    }
    cell.set_answer(answer);
    cell.set_total_seconds(absl::ToDoubleSeconds(absl::Now() - begin));
    lease = Lease();  // before the next cell asks for a place
    self->Record(std::move(cell), id);
  };
  const absl::Status status = frontend_.Submit(*std::move(request), std::move(sink));
  bool cancelled = false;  // while it was submitted
  {
    absl::MutexLock lock(&mu_);
    if (!status.ok()) in_flight_.erase(id);
    cancelled = cancelled_;
  }
  if (cancelled) frontend_.engine.Cancel(id);
  return status;
}

void NeedleRun::AddMass(const v1::NeedleCell& cell, const std::vector<std::vector<float>>& mass) {
  if (mass.empty() || !OutOfReach(cell, frontend_.conversion.spec->window())) return;
  std::vector<double> mean;
  {
    absl::MutexLock lock(&mu_);
    mass_.resize(mass.size() * mass[0].size());
    ++mass_cells_;
    size_t i = 0;
    for (const std::vector<float>& layer : mass) {
      for (const float m : layer) mean.push_back((mass_[i++] += m) / mass_cells_);
    }
  }
  on_mass_(std::move(mean));
}

// A cell is done, or cannot be; `request_id` is empty if it never was in flight.
void NeedleRun::Record(v1::NeedleCell cell, const std::string& request_id) {
  double mean = std::numeric_limits<double>::quiet_NaN();
  {
    absl::MutexLock lock(&mu_);
    if (!(cancelled_ && !cell.error().empty())) {
      ++done_;
      if (cell.error().empty()) {
        Score& score =
            scores_[cell.length_index() * request_.depth_percents_size() + cell.depth_index()];
        score.sum += cell.score();
        ++score.count;
        mean = score.sum / score.count;
      } else {
        ++failed_;
      }
      v1::RunNeedleResponse event;
      *event.mutable_cell() = cell;
      AppendLocked(std::move(event));
      v1::RunNeedleResponse progress;
      const double elapsed = absl::ToDoubleSeconds(absl::Now() - started_);
      progress.mutable_progress()->set_done_cells(done_);
      progress.mutable_progress()->set_total_cells(static_cast<uint32_t>(cells_.size()));
      progress.mutable_progress()->set_elapsed_seconds(elapsed);
      progress.mutable_progress()->set_eta_seconds(elapsed / done_ *
                                                   static_cast<double>(cells_.size() - done_));
      AppendLocked(std::move(progress));
    }
  }
  if (!std::isnan(mean)) on_score_(cell.context_length(), cell.depth_percent(), mean);
  Notify();
  absl::MutexLock lock(&mu_);
  if (!request_id.empty()) in_flight_.erase(request_id);
}

void NeedleRun::Finish() {
  {
    absl::MutexLock lock(&mu_);
    finished_ = true;
    v1::RunNeedleResponse event;
    *event.mutable_finished() = SummaryLocked();
    LogEnd(event.finished());
    AppendLocked(std::move(event));
  }
  Notify();
}

void NeedleRun::LogEnd(const v1::NeedleSummary& summary) const {
  Log(LogLevel::kInfo, "needle run ended",
      {{"run_id", id()},
       {"key", caller_.name()},
       {"state", v1::NeedleRunState_Name(summary.state())},
       {"cells", cells_.size()},
       {"failed", summary.failed_cells()},
       {"score", absl::StrFormat("%.3f", summary.mean_score())},
       {"seconds", LogValue::Seconds(absl::ToDoubleSeconds(absl::Now() - started_))}});
}

void NeedleRun::AppendLocked(v1::RunNeedleResponse event) {
  event.set_sequence(log_.size() + 1);
  log_.push_back(std::move(event));
}

void NeedleRun::Notify() {
  std::vector<std::shared_ptr<Watcher>> watchers;
  {
    absl::MutexLock lock(&mu_);
    watchers = watchers_;
  }
  for (const auto& watcher : watchers) watcher->OnMore();
}

v1::NeedleSummary NeedleRun::SummaryLocked() const {
  const int lengths = request_.context_lengths_size(), depths = request_.depth_percents_size();
  std::vector<Score> by_length(lengths), by_depth(depths);
  Score all;
  for (int l = 0; l < lengths; ++l) {
    for (int d = 0; d < depths; ++d) {
      const Score& score = scores_[l * depths + d];
      for (Score* sum : {&by_length[l], &by_depth[d], &all}) {
        sum->sum += score.sum;
        sum->count += score.count;
      }
    }
  }
  auto mean = [](const Score& s) { return static_cast<float>(s.sum / s.count); };  // NaN: no cell
  v1::NeedleSummary summary;
  summary.set_state(!finished_   ? v1::NEEDLE_RUN_STATE_RUNNING
                    : cancelled_ ? v1::NEEDLE_RUN_STATE_CANCELLED
                    : refused_ || (failed_ > 0 && failed_ == done_)
                        ? v1::NEEDLE_RUN_STATE_FAILED
                        : v1::NEEDLE_RUN_STATE_SUCCEEDED);
  summary.set_mean_score(mean(all));
  for (const Score& score : by_length) summary.add_score_by_length(mean(score));
  for (const Score& score : by_depth) summary.add_score_by_depth(mean(score));
  summary.set_failed_cells(failed_);
  return summary;
}

}  // namespace longspan
