// longspan needle: runs a grid on a live server, draws it as it fills, keeps its results.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <set>
#include <thread>
#include <tuple>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "longspan/v1/admin.grpc.pb.h"
#include "longspan/v1/needle.grpc.pb.h"
#include "server/cli.h"
#include "server/cli_client.h"
#include "server/needle_report.h"

namespace longspan {
namespace {

constexpr int kInterrupted = 130, kBelowMinimum = 3;

struct Options {
  cli::Target target;
  std::string model, run_id, out, color = "auto";
  std::vector<int64_t> lengths = {1024, 2048, 4096, 8192};
  std::string depths = "11", scale = "linear", task = "single", haystack = "essay", haystack_file;
  int trials = 1, keys = 0, values = 0, concurrency = 8, max_tokens = 0, priority = 0, worst = 10;
  int64_t seed = 0;
  double temperature = 0, min_score = -1;
  bool detach = false, spans = true, json = false, jsonl = false, save = true;
  bool grid_told = false;  // some flag says what the grid or its task is

  std::optional<int> Read(int argc, char** argv);
};

std::optional<int> Options::Read(int argc, char** argv) {
  Flags flags(
      "needle", "[flags]",
      "Hides a fact at every depth of every context length, asks for it, and draws what the "
      "model finds. RULER's single-needle family; the runs go through the server's ordinary "
      "scheduler, beside everyone's requests.");
  cli::TargetFlags(flags, &target);
  cli::ModelFlag(flags, &model);
  flags.Section("The grid");
  flags.Ints("lengths", &lengths, "N,N,...", "context lengths in tokens, the answer included");
  flags.String(
      "depths", &depths, "N or P,P,...",
      "how many depths, or a list of percents: 0 is the start, 100 just before the question");
  flags.Choice("depth-scale", &scale, {"linear", "sigmoid"},
               "how N depths are spread; sigmoid looks closer at both ends");
  flags.Int("trials", &trials, "needles for each length and depth", 1, 4096);
  flags.Int64("seed", &seed, "same seed, same prompts", 0);
  flags.Section("The task");
  flags.Choice("task", &task, {"single", "multi-key", "multi-value", "multi-query"},
               "one needle; one among others' keys; one key's several values; several keys");
  flags.Int("keys", &keys, "needles with different keys; 0 is the task's default (4)");
  flags.Int("values", &values, "values for each key; 0 is the task's default (4)");
  flags.Choice("haystack", &haystack, {"essay", "noise", "needles"}, "what surrounds the needles");
  flags.String("haystack-file", &haystack_file, "FILE", "your own text instead of the essay");
  flags.Double("temperature", &temperature, "of the answers; 0 is greedy");
  flags.Int("max-tokens", &max_tokens, "of an answer; 0 is enough for it");
  flags.Section("The run");
  flags.Int("concurrency", &concurrency, "cells in flight", 1, 256);
  flags.Int("priority", &priority, "of the run's requests; larger goes first", -1000, 1000);
  flags.Bool("detach", &detach, "the run goes on when this client leaves");
  flags.String("run-id", &run_id, "ID",
               "name the run, or attach to the one of this name; its grid need not be told again");
  flags.Bool("spans", &spans, "record every head's attention on the needle");
  flags.Section("Results");
  flags.String(
      "out", &out, "DIR",
      "where results go; a half-done run with the same settings there is resumed; empty is "
      "needle-runs/RUN_ID");
  flags.Bool("save", &save, "write results.jsonl, summary.json, heatmap.svg and report.html");
  flags.Double("min-score", &min_score, "exit 3 if the mean score is below it");
  flags.Int("worst", &worst, "how many of the worst cells to show");
  flags.Bool("json", &json, "print the summary as one JSON object instead");
  flags.Bool("jsonl", &jsonl, "print each cell as one JSON line, as it comes, instead");
  cli::ColourFlag(flags, &color);
  flags.Epilogue(
      "Examples:\n"
      "  longspan needle --lengths 1k,2k,4k,8k --depths 11 --trials 2\n"
      "  longspan needle --task multi-key --haystack noise --lengths 4k --depths 0,50,100\n"
      "  longspan needle --out runs/a      (Ctrl-C, then the same again: goes on where it was)\n"
      "  longspan needle --run-id nightly --detach      (later: longspan needle --run-id nightly)\n"
      "Exit status: 0 done, 1 failed, 2 used wrongly, 3 below --min-score, 130 interrupted with "
      "what was done saved.");
  const auto exit = flags.Parse(argc, argv);
  for (const char* name : {"lengths", "depths", "depth-scale", "trials", "seed", "task", "keys",
                           "values", "haystack", "haystack-file", "temperature", "max-tokens"}) {
    grid_told |= flags.IsSet(name);
  }
  return exit;
}

const std::map<std::string, v1::NeedleTask> kTasks = {{"single", v1::NEEDLE_TASK_SINGLE},
                                                      {"multi-key", v1::NEEDLE_TASK_MULTI_KEY},
                                                      {"multi-value", v1::NEEDLE_TASK_MULTI_VALUE},
                                                      {"multi-query", v1::NEEDLE_TASK_MULTI_QUERY}};
const std::map<std::string, v1::HaystackKind> kHaystacks = {{"essay", v1::HAYSTACK_KIND_ESSAY},
                                                            {"noise", v1::HAYSTACK_KIND_NOISE},
                                                            {"needles", v1::HAYSTACK_KIND_NEEDLES}};

template <class Enum>
std::string NameOf(const std::map<std::string, Enum>& names, int value) {
  for (const auto& [name, named] : names) {
    if (named == value) return name;
  }
  return absl::StrCat(value);
}

absl::StatusOr<std::vector<float>> Depths(const std::string& text, const std::string& scale) {
  std::vector<float> depths;
  int count = 0;
  if (absl::SimpleAtoi(text, &count)) {
    if (count < 1 || count > 256) {
      return absl::InvalidArgumentError(
          absl::StrCat("--depths: ", count, " depths, must be from 1 to 256"));
    }
    for (int i = 0; i < count; ++i) {
      const double linear = count == 1 ? 50 : 100.0 * i / (count - 1);
      // The logistic curve of the original needle test: slope 0.1, its ends pulled to 0 and 100.
      const double curve =
          linear == 0 || linear == 100 ? linear : 100 / (1 + std::exp(-0.1 * (linear - 50)));
      depths.push_back(static_cast<float>(scale == "sigmoid" ? curve : linear));
    }
    return depths;
  }
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    absl::StatusOr<double> depth = ParseNumber(part);
    if (!depth.ok())
      return absl::InvalidArgumentError(absl::StrCat("--depths: ", depth.status().message()));
    depths.push_back(static_cast<float>(*depth));
  }
  return depths;
}

absl::StatusOr<v1::RunNeedleRequest> MakeRequest(const Options& o) {
  v1::RunNeedleRequest r;
  r.set_model(o.model);
  for (const int64_t length : o.lengths) {
    if (length < 1 || length > UINT32_MAX) {
      return absl::InvalidArgumentError(absl::StrCat("--lengths: ", length, " is out of range"));
    }
    r.add_context_lengths(static_cast<uint32_t>(length));
  }
  absl::StatusOr<std::vector<float>> depths = Depths(o.depths, o.scale);
  if (!depths.ok()) return depths.status();
  r.mutable_depth_percents()->Add(depths->begin(), depths->end());
  r.set_trials(o.trials);
  r.set_task(kTasks.at(o.task));
  r.set_haystack(kHaystacks.at(o.haystack));
  if (!o.haystack_file.empty()) {
    std::ifstream in(o.haystack_file, std::ios::binary);
    if (!in) return absl::InvalidArgumentError(absl::StrCat("cannot read ", o.haystack_file));
    r.set_haystack_text(std::string(std::istreambuf_iterator<char>(in), {}));
  }
  r.set_num_keys(o.keys);
  r.set_num_values(o.values);
  r.set_seed(o.seed);
  r.set_concurrency(o.concurrency);
  r.mutable_sampling()->set_temperature(static_cast<float>(o.temperature));
  r.set_max_tokens(o.max_tokens);
  r.set_record_attention_spans(o.spans);
  r.set_detach(o.detach);
  r.set_run_id(o.run_id);
  r.set_priority(o.priority);
  return r;
}

// SIGINT and SIGTERM cancel the call that is watched; a second one ends the process. Made before
// any other thread, so that all inherit the blocked signals.
class Interrupts {
 public:
  Interrupts() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGINT);
    sigaddset(&set_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set_, &before_);
    thread_ = std::thread([this] { Loop(); });
  }
  ~Interrupts() {
    stop_ = true;
    thread_.join();
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  void Watch(grpc::ClientContext* context) {  // nullptr: none any more
    absl::MutexLock lock(&mu_);
    context_ = context;
    if (interrupted_ && context_ != nullptr) context_->TryCancel();
  }
  bool any() const { return interrupted_; }

 private:
  void Loop() {
    const timespec pause = {0, 50'000'000};
    while (!stop_) {
      if (sigtimedwait(&set_, nullptr, &pause) < 0) continue;
      if (interrupted_.exchange(true)) _exit(kInterrupted);
      absl::MutexLock lock(&mu_);
      if (context_ != nullptr) context_->TryCancel();
    }
  }
  sigset_t set_, before_;
  std::atomic<bool> stop_{false}, interrupted_{false};
  absl::Mutex mu_;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mu_) = nullptr;
  std::thread thread_;
};

// The grid as it fills, on stderr: redrawn in place on a terminal, else a line every few seconds.
class LivePicture {
 public:
  explicit LivePicture(const std::string& color)
      : terminal_(isatty(STDERR_FILENO) == 1), colour_(cli::Colour(color, STDERR_FILENO)) {}
  ~LivePicture() { Clear(); }

  void Show(const NeedleReport& report, const v1::NeedleProgress& progress, bool force) {
    const absl::Time now = absl::Now();
    if (!force && now - shown_ < (terminal_ ? absl::Milliseconds(100) : absl::Seconds(5))) return;
    shown_ = now;
    const std::string line =
        absl::StrFormat("%d of %d cells, mean score %.3f, %.0f s, about %.0f s to go",
                        progress.done_cells(), progress.total_cells(), Overall(report).mean,
                        progress.elapsed_seconds(), progress.eta_seconds());
    if (!terminal_) {
      std::cerr << line << std::endl;
      return;
    }
    Clear();
    const std::vector<std::string> rows = DrawText(ScoreMap(report), colour_);
    for (const std::string& row : rows) std::cerr << row << "\n";
    std::cerr << line << std::endl;
    drawn_ = static_cast<int>(rows.size()) + 1;
  }
  void Clear() {
    if (drawn_ > 0) std::cerr << "\033[" << drawn_ << "A\033[J" << std::flush;
    drawn_ = 0;
  }

 private:
  const bool terminal_, colour_;
  absl::Time shown_ = absl::InfinitePast();
  int drawn_ = 0;
};

class NeedleClient {
 public:
  NeedleClient(Options options, v1::RunNeedleRequest request)
      : options_(std::move(options)), request_(std::move(request)) {}

  int Run();

 private:
  bool Adopt(v1::NeedleService::Stub& stub);
  bool Prepare();
  void Header();
  bool Receive(v1::NeedleService::Stub& stub, Interrupts& interrupts);
  bool Take(const v1::RunNeedleResponse& event, LivePicture& picture);
  bool Started(const v1::NeedleStarted& started);
  int Finish();
  int Fail(const absl::Status& status, int exit) {
    std::cerr << "longspan needle: " << status.message() << "\n";
    return exit;
  }

  const Options options_;
  v1::RunNeedleRequest request_;
  std::shared_ptr<grpc::Channel> channel_;
  NeedleReport report_;
  std::set<std::tuple<uint32_t, uint32_t, uint32_t>> have_;
  std::string folder_;
  double seconds_before_ = 0;
  bool interrupted_ = false, failed_ = false;
  int exit_ = 0;
};

// Takes the grid of the run that --run-id names, if there is one and no flag tells a grid. False
// when the server cannot be asked; exit_ is set.
bool NeedleClient::Adopt(v1::NeedleService::Stub& stub) {
  if (options_.run_id.empty() || options_.grid_told) return true;
  v1::GetNeedleRunRequest question;
  question.set_run_id(options_.run_id);
  v1::GetNeedleRunResponse answer;
  grpc::ClientContext context;
  const grpc::Status status = stub.GetNeedleRun(&context, question, &answer);
  if (status.ok()) {
    request_ = answer.run().request();
    request_.clear_skip_cells();
  } else if (status.error_code() != grpc::StatusCode::NOT_FOUND) {
    exit_ = cli::Fail("needle", status);
  }
  return exit_ == 0;
}

// Reads what an earlier run left in --out. False when it cannot be gone on with; exit_ is set.
bool NeedleClient::Prepare() {
  report_.request = request_;
  if (!options_.save || options_.out.empty()) return true;
  absl::StatusOr<NeedleReport> earlier = LoadReport(options_.out, request_);
  if (!earlier.ok()) {
    exit_ = Fail(earlier.status(), 2);
    return false;
  }
  report_ = *std::move(earlier);
  seconds_before_ = report_.seconds;
  for (const v1::NeedleCell& cell : report_.cells) {
    have_.insert({cell.length_index(), cell.depth_index(), cell.trial()});
    v1::NeedleCellKey* skip = request_.add_skip_cells();
    skip->set_length_index(cell.length_index());
    skip->set_depth_index(cell.depth_index());
    skip->set_trial(cell.trial());
  }
  if (!report_.cells.empty()) {
    std::cerr << options_.out << ": " << report_.cells.size() << " cells are done, going on\n";
  }
  return true;
}

void NeedleClient::Header() {
  v1::GetServerInfoResponse info;
  v1::GetModelResponse model;
  grpc::ClientContext info_context, model_context;
  const auto info_status =
      v1::AdminService::NewStub(channel_)->GetServerInfo(&info_context, {}, &info);
  const auto model_status =
      v1::ModelService::NewStub(channel_)->GetModel(&model_context, {}, &model);
  if (!info_status.ok() || !model_status.ok()) return;  // the run itself will tell what is wrong
  report_.model = model.model().id();
  for (const auto& layer : model.model().layers()) {
    report_.window = std::max(report_.window, static_cast<int>(layer.window_tokens()));
  }
  report_.version = absl::StrCat(info.version(), " (", info.git_commit(), ")");
  std::cerr << absl::StreamFormat(
      "%s, longspan %s on %s, tokenizer %s\n%d lengths x %d depths x %d trials, task %s, haystack "
      "%s, seed %d\n",
      report_.model, report_.version, info.device(), model.model().tokenizer(),
      request_.context_lengths_size(), request_.depth_percents_size(), request_.trials(),
      NameOf(kTasks, request_.task()),
      request_.haystack_text().empty() ? NameOf(kHaystacks, request_.haystack()) : "your own text",
      request_.seed());
}

bool NeedleClient::Started(const v1::NeedleStarted& started) {
  report_.run_id = started.run_id();
  if (!options_.save) return true;
  folder_ = options_.out.empty() ? absl::StrCat("needle-runs/", started.run_id()) : options_.out;
  if (absl::Status s = WriteReport(folder_, report_); !s.ok()) {
    exit_ = Fail(s, 1);
    return false;
  }
  return true;
}

bool NeedleClient::Take(const v1::RunNeedleResponse& event, LivePicture& picture) {
  if (event.has_started()) return Started(event.started());
  if (event.has_cell()) {
    const v1::NeedleCell& cell = event.cell();
    if (!have_.insert({cell.length_index(), cell.depth_index(), cell.trial()}).second) return true;
    report_.cells.push_back(cell);
    if (options_.jsonl) std::cout << cli::ToJson(cell, false) << std::endl;
    if (folder_.empty()) return true;
    const absl::Status s = AppendCell(folder_, cell);
    if (!s.ok()) exit_ = Fail(s, 1);
    return s.ok();
  }
  if (event.has_progress()) {
    report_.seconds = seconds_before_ + event.progress().elapsed_seconds();
    picture.Show(report_, event.progress(),
                 event.progress().done_cells() == event.progress().total_cells());
  }
  if (event.has_finished()) {
    report_.complete = event.finished().state() == v1::NEEDLE_RUN_STATE_SUCCEEDED;
    failed_ = !report_.complete;
  }
  return true;
}

// False when nothing can be reported; exit_ is set.
bool NeedleClient::Receive(v1::NeedleService::Stub& stub, Interrupts& interrupts) {
  grpc::ClientContext context;
  interrupts.Watch(&context);
  auto reader = stub.RunNeedle(&context, request_);
  bool going = true;
  {
    LivePicture picture(options_.color);
    v1::RunNeedleResponse event;
    while (going && reader->Read(&event)) going = Take(event, picture);
  }
  if (!going) context.TryCancel();
  const grpc::Status status = reader->Finish();
  interrupts.Watch(nullptr);
  interrupted_ = interrupts.any();
  if (!going) return false;
  if (!status.ok() && !interrupted_) {
    exit_ = cli::Fail("needle", status);
    failed_ = true;
  }
  return !report_.run_id.empty();
}

int NeedleClient::Finish() {
  if (!folder_.empty()) {
    if (absl::Status s = WriteReport(folder_, report_); !s.ok()) return Fail(s, 1);
  }
  if (options_.json) {
    std::cout << SummaryJson(report_) << "\n";
  } else if (!options_.jsonl) {
    for (const std::string& row :
         DrawText(ScoreMap(report_), cli::Colour(options_.color, STDOUT_FILENO))) {
      std::cout << row << "\n";
    }
    std::cout << "\n" << ReportText(report_, options_.worst) << std::flush;
  }
  if (!folder_.empty()) {
    std::cerr << "\nwritten: " << folder_
              << "/{results.jsonl,summary.json,heatmap.svg,report.html}\n";
  }
  if (interrupted_) {
    std::cerr << (options_.detach ? "left; the run goes on as --run-id " + report_.run_id
                                  : "interrupted; the same command with --out " + folder_ +
                                        " goes on from here")
              << "\n";
    return kInterrupted;
  }
  if (failed_) return 1;
  const MeanScore all = Overall(report_);
  if (options_.min_score >= 0 && !(all.mean >= options_.min_score)) {
    std::cerr << absl::StreamFormat("mean score %.3f is below --min-score %g\n", all.mean,
                                    options_.min_score);
    return kBelowMinimum;
  }
  return 0;
}

int NeedleClient::Run() {
  Interrupts interrupts;
  channel_ = cli::Connect(options_.target);
  const auto stub = v1::NeedleService::NewStub(channel_);
  if (!Adopt(*stub) || !Prepare()) return exit_;
  Header();
  if (!Receive(*stub, interrupts)) return interrupted_ ? kInterrupted : exit_ != 0 ? exit_ : 1;
  return Finish();
}

}  // namespace

int RunNeedleCommand(int argc, char** argv) {
  Options options;
  if (auto exit = options.Read(argc, argv); exit.has_value()) return *exit;
  absl::StatusOr<v1::RunNeedleRequest> request = MakeRequest(options);
  if (!request.ok()) {
    std::cerr << "longspan needle: " << request.status().message() << "\n";
    return 2;
  }
  return NeedleClient(std::move(options), *std::move(request)).Run();
}

}  // namespace longspan
