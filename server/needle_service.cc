#include "server/needle_service.h"

#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/answer.h"
#include "server/config.h"
#include "server/log.h"
#include "server/needle_request.h"
#include "server/needle_run.h"
#include "server/status.h"

namespace longspan {
namespace {

constexpr size_t kRememberedRuns = 64;
constexpr size_t kRememberedCells = 32768;  // of all runs; one is a few KiB with its head masses
constexpr size_t kRunningRuns = 8;          // each has a thread
constexpr size_t kScoreSeries = 512;        // (length, depth) pairs exported as metrics
constexpr uint32_t kDefaultPage = 50, kLargestPage = 1000;

absl::StatusOr<std::string> ReadEssay() {
  auto path = HaystackPath();
  if (!path.ok()) return absl::FailedPreconditionError(path.status().message());
  std::ifstream in(*path, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(in), {});
  if (!in && text.empty())
    return absl::FailedPreconditionError(absl::StrCat("cannot read ", *path));
  return text;
}

// The runs that are going on and those that are remembered, and what they share.
class NeedleRuns {
 public:
  explicit NeedleRuns(const Frontend& frontend) : frontend_(frontend) {}
  ~NeedleRuns() {
    std::map<uint64_t, std::shared_ptr<NeedleRun>> runs;
    {
      absl::MutexLock lock(&mu_);
      runs.swap(runs_);
    }
    for (const auto& [serial, run] : runs) run->Cancel();
    for (const auto& [serial, run] : runs) run->Join();
  }

  // The known run of that id, or a new one that has not been started; *created tells which.
  absl::StatusOr<std::shared_ptr<NeedleRun>> FindOrCreate(const v1::RunNeedleRequest& request,
                                                          const Caller& caller, bool* created) {
    *created = false;
    if (!request.run_id().empty() && request.context_lengths().empty())
      return Find(request.run_id(), caller);
    auto completed = CompleteNeedleRequest(request, frontend_.conversion);
    if (!completed.ok()) return completed.status();
    if (!completed->run_id().empty()) {
      if (auto known = Find(completed->run_id(), caller); known.ok()) {
        if (SameGrid((*known)->request(), *completed)) return known;
        return absl::FailedPreconditionError(
            absl::StrCat("run_id: run '", completed->run_id(),
                         "' is known and has another grid or other knobs"));
      }
    } else {
      completed->set_run_id(NewId("needle-"));
    }
    if (frontend_.engine.Stats().draining) return absl::UnavailableError("the server is draining");
    auto prompter = PrompterFor(*completed);
    if (!prompter.ok()) return prompter.status();
    if (absl::Status s = CheckLengths(*completed, **prompter); !s.ok()) return s;
    *created = true;
    return Add(std::make_shared<NeedleRun>(
        frontend_, caller, *std::move(completed), *std::move(prompter),
        [this](int length, double depth, double score) { Publish(length, depth, score); },
        [this](std::vector<double> mean) { frontend_.metrics.SetNeedleMass(std::move(mean)); }));
  }

  // NotFound for another key's run as for none.
  absl::StatusOr<std::shared_ptr<NeedleRun>> Find(const std::string& id,
                                                  const Caller& caller) const {
    absl::MutexLock lock(&mu_);
    for (const auto& [serial, run] : runs_) {
      if (run->id() == id && caller.MaySee(run->caller())) return run;
    }
    return absl::NotFoundError(absl::StrCat("run_id: run '", id, "' is not known"));
  }

  // Oldest first, from `token` on.
  absl::Status List(const v1::ListNeedleRunsRequest& request, const Caller& caller,
                    v1::ListNeedleRunsResponse* response) {
    const std::string& token = request.page_token();
    uint32_t size = request.page_size();
    uint64_t first = 0;
    if (!token.empty() && !absl::SimpleAtoi(token, &first)) {
      return absl::InvalidArgumentError(
          absl::StrCat("page_token: '", token, "' is not one that this server gave"));
    }
    if (size > kLargestPage) {
      return absl::InvalidArgumentError(
          absl::StrCat("page_size: is ", size, ", the limit is ", kLargestPage));
    }
    if (size == 0) size = kDefaultPage;
    absl::MutexLock lock(&mu_);
    for (auto it = runs_.lower_bound(first); it != runs_.end(); ++it) {
      if (!caller.MaySee(it->second->caller())) continue;
      if (static_cast<uint32_t>(response->items_size()) == size) {
        response->set_next_page_token(absl::StrCat(it->first));
        break;
      }
      *response->add_items() = it->second->Snapshot(/*with_cells=*/false);
    }
    return absl::OkStatus();
  }

 private:
  // The shortest of a grid's prompts decides whether all can be built.
  static absl::Status CheckLengths(const v1::RunNeedleRequest& r, const NeedlePrompter& prompter) {
    for (int i = 0; i < r.context_lengths_size(); ++i) {
      v1::NeedleCellKey cell;
      cell.set_length_index(i);
      auto prompt = prompter.Build(SpecOf(r, cell));
      if (prompt.ok()) continue;
      if (!absl::IsInvalidArgument(prompt.status())) return prompt.status();
      return absl::InvalidArgumentError(
          absl::StrCat("context_lengths: ", prompt.status().message()));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::shared_ptr<const NeedlePrompter>> PrompterFor(const v1::RunNeedleRequest& r) {
    const Tokenizer& tokenizer = *frontend_.conversion.tokenizer;
    const Haystack haystack = HaystackOf(r);
    if (!r.haystack_text().empty()) {
      auto own = NeedlePrompter::Create(tokenizer, haystack, r.haystack_text());
      if (!own.ok()) return own.status();
      return std::shared_ptr<const NeedlePrompter>(*std::move(own));
    }
    absl::MutexLock lock(&prompters_mu_);
    std::shared_ptr<const NeedlePrompter>& shared = prompters_[haystack];
    if (shared != nullptr) return shared;
    std::string prose;
    if (haystack == Haystack::kEssay) {
      auto essay = ReadEssay();
      if (!essay.ok()) return essay.status();
      prose = *std::move(essay);
    }
    auto made = NeedlePrompter::Create(tokenizer, haystack, prose);
    if (!made.ok()) return made.status();
    shared = *std::move(made);
    return shared;
  }

  // Makes room by forgetting finished runs, oldest first.
  absl::StatusOr<std::shared_ptr<NeedleRun>> Add(std::shared_ptr<NeedleRun> run) {
    std::vector<std::shared_ptr<NeedleRun>> forgotten;  // their threads are joined outside the lock
    absl::MutexLock lock(&mu_);
    size_t running = 0, cells = run->cells();
    for (const auto& [serial, known] : runs_) {
      if (known->id() == run->id()) {
        return absl::AlreadyExistsError(
            absl::StrCat("run_id: run '", run->id(), "' has just begun"));
      }
      running += !known->finished();
      cells += known->cells();
    }
    if (running >= kRunningRuns) {
      return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                            running, " needle runs are going on, the limit is ", kRunningRuns)),
                        "QUEUE_FULL");
    }
    for (auto it = runs_.begin();
         it != runs_.end() && (runs_.size() >= kRememberedRuns || cells > kRememberedCells);) {
      if (!it->second->finished()) {
        ++it;
        continue;
      }
      cells -= it->second->cells();
      forgotten.push_back(std::move(it->second));
      it = runs_.erase(it);
    }
    runs_[next_serial_++] = run;
    return run;
  }

  // Bounded, since clients choose the labels.
  void Publish(int length, double depth, double score) {
    {
      absl::MutexLock lock(&mu_);
      if (published_.size() >= kScoreSeries && !published_.contains({length, depth})) return;
      published_.insert({length, depth});
    }
    frontend_.metrics.SetNeedleScore(length, depth, score);
  }

  const Frontend& frontend_;
  absl::Mutex prompters_mu_;
  std::map<Haystack, std::shared_ptr<const NeedlePrompter>> prompters_
      ABSL_GUARDED_BY(prompters_mu_);
  mutable absl::Mutex mu_;
  std::map<uint64_t, std::shared_ptr<NeedleRun>> runs_ ABSL_GUARDED_BY(mu_);  // by age
  uint64_t next_serial_ ABSL_GUARDED_BY(mu_) = 1;
  std::set<std::pair<int, double>> published_ ABSL_GUARDED_BY(mu_);
};

// One watching stream: writes the run's log from its beginning, one event at a time, as far as it
// goes. Nothing is buffered for a slow reader but the log itself.
class WatchCall : public grpc::ServerWriteReactor<v1::RunNeedleResponse>,
                  public NeedleRun::Watcher,
                  public std::enable_shared_from_this<WatchCall> {
 public:
  WatchCall(const Frontend& frontend, grpc::CallbackServerContext* context)
      : frontend_(frontend), context_(context) {}
  // Lives from now until OnDone.
  void Hold() { self_ = shared_from_this(); }

  // Each once, from any thread.
  void Begin(const std::shared_ptr<NeedleRun>& run) {
    stream_ = frontend_.watchdog.Add([this] { context_->TryCancel(); });
    {
      absl::MutexLock lock(&mu_);
      run_ = run;
    }
    run->Attach(self_);
    if (Broken()) run->Detach(this);  // the client has left meanwhile
    OnMore();
  }
  void Refuse(const absl::Status& status) {
    Log(LogLevel::kInfo, "request ended",
        {{"method", "RunNeedle"},
         {"code", absl::StatusCodeToString(status.code())},
         {"message", status.message()}});
    frontend_.metrics.CountRefusal(status);
    Finish(ToGrpc(status, context_));
  }

  void OnMore() override {
    enum class Action { kNone, kWrite, kFinish } action = Action::kNone;
    {
      absl::MutexLock lock(&mu_);
      if (writing_ || ended_) return;
      if (run_ == nullptr) return;
      if (broken_ || run_->EndsAt(next_)) {
        ended_ = true;
        action = Action::kFinish;
      } else if (auto event = run_->EventAt(next_); event.has_value()) {
        current_ = *std::move(event);
        ++next_;
        writing_ = true;
        action = Action::kWrite;
      }
    }
    if (action == Action::kWrite) {
      frontend_.watchdog.WriteBegan(stream_);
      StartWrite(&current_);
    } else if (action == Action::kFinish) {
      Finish(context_->IsCancelled() ? grpc::Status::CANCELLED : grpc::Status::OK);
    }
  }

 private:
  void OnWriteDone(bool ok) override {
    frontend_.watchdog.WriteEnded(stream_);
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      if (!ok) broken_ = true;
    }
    OnMore();
  }
  void OnCancel() override {
    {
      absl::MutexLock lock(&mu_);
      broken_ = true;
    }
    if (const auto attached = run(); attached != nullptr) attached->Detach(this);
    OnMore();
  }
  void OnDone() override {
    if (stream_ != 0) frontend_.watchdog.Remove(stream_);
    if (const auto attached = run(); attached != nullptr) attached->Detach(this);
    const std::shared_ptr<WatchCall> last = std::move(self_);
  }
  std::shared_ptr<NeedleRun> run() const {
    absl::MutexLock lock(&mu_);
    return run_;
  }
  bool Broken() const {
    absl::MutexLock lock(&mu_);
    return broken_;
  }

  const Frontend& frontend_;
  grpc::CallbackServerContext* const context_;
  std::shared_ptr<WatchCall> self_;  // until OnDone
  uint64_t stream_ = 0;
  v1::RunNeedleResponse current_;  // belongs to the outstanding write
  mutable absl::Mutex mu_;
  std::shared_ptr<NeedleRun> run_ ABSL_GUARDED_BY(mu_);  // once begun
  size_t next_ ABSL_GUARDED_BY(mu_) = 0;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool broken_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
};

class NeedleServiceImpl final : public v1::NeedleService::CallbackService {
 public:
  explicit NeedleServiceImpl(const Frontend& frontend) : f_(frontend), runs_(frontend) {}

  grpc::ServerWriteReactor<v1::RunNeedleResponse>* RunNeedle(
      grpc::CallbackServerContext* context, const v1::RunNeedleRequest* request) override {
    const auto call = std::make_shared<WatchCall>(f_, context);
    call->Hold();
    auto caller = f_.Authenticate(*context, Role::kUser);
    if (!caller.ok()) {
      call->Refuse(caller.status());
      return call.get();
    }
    // A new run tokenizes its haystack and builds a prompt of each length, whatever the message's
    // size. Until Finish, gRPC keeps the message.
    const size_t bytes = request->context_lengths().empty() ? 0 : SIZE_MAX;
    f_.prompt_worker.Run(bytes, [this, call, request, caller = *std::move(caller)] {
      bool created = false;
      auto run = runs_.FindOrCreate(*request, caller, &created);
      if (!run.ok()) return call->Refuse(run.status());
      if (created) (*run)->Start();
      call->Begin(*run);  // last: the server may end with the call
    });
    return call.get();
  }

  grpc::ServerUnaryReactor* GetNeedleRun(grpc::CallbackServerContext* context,
                                         const v1::GetNeedleRunRequest* request,
                                         v1::GetNeedleRunResponse* response) override {
    return Answer(f_, context, Role::kUser, [&](const Caller& caller) {
      auto run = runs_.Find(request->run_id(), caller);
      if (run.ok()) *response->mutable_run() = (*run)->Snapshot(/*with_cells=*/true);
      return run.status();
    });
  }

  grpc::ServerUnaryReactor* ListNeedleRuns(grpc::CallbackServerContext* context,
                                           const v1::ListNeedleRunsRequest* request,
                                           v1::ListNeedleRunsResponse* response) override {
    return Answer(f_, context, Role::kUser,
                  [&](const Caller& caller) { return runs_.List(*request, caller, response); });
  }

  grpc::ServerUnaryReactor* CancelNeedleRun(grpc::CallbackServerContext* context,
                                            const v1::CancelNeedleRunRequest* request,
                                            v1::CancelNeedleRunResponse* response) override {
    return Answer(f_, context, Role::kUser, [&](const Caller& caller) {
      auto run = runs_.Find(request->run_id(), caller);
      if (run.ok()) {
        const bool was_finished = (*run)->finished();
        (*run)->Cancel();
        response->set_state(was_finished ? (*run)->Snapshot(false).summary().state()
                                         : v1::NEEDLE_RUN_STATE_CANCELLED);
      }
      return run.status();
    });
  }

 private:
  const Frontend& f_;
  NeedleRuns runs_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeNeedleService(const Frontend& frontend) {
  return std::make_unique<NeedleServiceImpl>(frontend);
}

}  // namespace longspan
