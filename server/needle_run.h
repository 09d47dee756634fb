#pragma once
// One needle run: a thread that builds prompts and keeps `concurrency` of them in the engine, and a
// log of events that any number of watchers read at their own pace. Thread-safe.
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "longspan/v1/needle.pb.h"
#include "server/frontend.h"
#include "server/needle_prompt.h"

namespace longspan {

class NeedleRun : public std::enable_shared_from_this<NeedleRun> {
 public:
  class Watcher {
   public:
    virtual ~Watcher() = default;
    virtual void OnMore() = 0;  // new events, or the end; called without the run's lock
  };
  // Told the mean score so far of a (context length, depth) whenever it changes.
  using OnScore = std::function<void(int context_length, double depth_percent, double score)>;
  // Told each head's mean mass on the needle so far, [layers, heads], over the cells whose needle
  // is out of every window's reach (needle_report.h has the rule).
  using OnMass = std::function<void(std::vector<double> mean)>;

  // `request` is complete (needle_request.h) and has a run_id. Each cell is a request of `caller`,
  // whose limits the run waits for.
  NeedleRun(const Frontend& frontend, Caller caller, v1::RunNeedleRequest request,
            std::shared_ptr<const NeedlePrompter> prompter, OnScore on_score, OnMass on_mass);
  ~NeedleRun();

  void Start();
  void Cancel();  // ends the run within a step; cells that are not done are not recorded
  void Join();

  void Attach(std::shared_ptr<Watcher> watcher);
  void Detach(
      const Watcher* watcher);  // the last one's leaving cancels the run unless it is detached
  // Event i of the log; nullopt if it has not happened yet.
  std::optional<v1::RunNeedleResponse> EventAt(size_t i) const;
  bool EndsAt(size_t i) const;  // finished, and the log has no event i

  const Caller& caller() const { return caller_; }
  const v1::RunNeedleRequest& request() const { return request_; }
  const std::string& id() const { return request_.run_id(); }
  size_t cells() const { return cells_.size(); }
  bool finished() const;
  v1::NeedleRun Snapshot(bool with_cells) const;

 private:
  struct Score {
    double sum = 0;
    int count = 0;
  };
  void Loop();
  bool WaitForPlace();
  bool Submit(const v1::NeedleCellKey& cell);
  absl::Status SubmitOnce(const v1::NeedleCell& cell, const NeedlePrompt& prompt);
  v1::NeedleCell CellOf(const v1::NeedleCellKey& key) const;
  void Record(v1::NeedleCell cell, const std::string& request_id);
  void AddMass(const v1::NeedleCell& cell, const std::vector<std::vector<float>>& mass);
  void Finish();
  void Notify();
  void LogEnd(const v1::NeedleSummary& summary) const;
  v1::NeedleSummary SummaryLocked() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  void AppendLocked(v1::RunNeedleResponse event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Frontend& frontend_;
  const Caller caller_;
  const v1::RunNeedleRequest request_;
  const std::shared_ptr<const NeedlePrompter> prompter_;
  const OnScore on_score_;
  const OnMass on_mass_;
  const std::vector<v1::NeedleCellKey> cells_;
  const absl::Time started_ = absl::Now();
  std::thread thread_;

  mutable absl::Mutex mu_;
  std::vector<v1::RunNeedleResponse> log_ ABSL_GUARDED_BY(mu_);
  std::vector<std::shared_ptr<Watcher>> watchers_ ABSL_GUARDED_BY(mu_);
  std::set<std::string> in_flight_ ABSL_GUARDED_BY(mu_);
  std::vector<Score> scores_ ABSL_GUARDED_BY(mu_);  // [lengths, depths]
  std::vector<double> mass_ ABSL_GUARDED_BY(mu_);   // [layers, heads], sums over mass_cells_
  int mass_cells_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t done_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t failed_ ABSL_GUARDED_BY(mu_) = 0;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool refused_ ABSL_GUARDED_BY(mu_) = false;  // the server goes down
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace longspan
