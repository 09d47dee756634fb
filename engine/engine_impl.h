#pragma once
// What is behind Engine: the state of its one thread (engine_thread.cc), and what other threads
// share with it under one short mutex (engine.cc).
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/random/random.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "engine/engine.h"
#include "engine/sampler.h"
#include "engine/sequence.h"
#include "engine/stager.h"
#include "engine/token_drawer.h"
#include "engine/validate.h"

namespace longspan {

// A request on its way from Submit() to the engine thread.
struct Incoming {
  Request request;
  EventSink sink;
  uint64_t seed = 0;
  absl::Time submitted;
};

// A request in flight, with its choices. Engine thread.
struct Active {
  Request request;
  EventSink sink;
  uint64_t seed = 0;
  uint64_t arrival = 0;
  // Choice 0 reads the prompt; the others are made when it has (nullptr before).
  std::vector<std::unique_ptr<Sequence>> choices;
  int unfinished = 0;
  bool prompt_done = false;
  bool counted_in_spans = false;
  std::vector<TokenLogprob> prompt_logprobs;
  std::optional<SpanSums> spans;
  std::vector<std::vector<float>> probe_mass;
  absl::Time submitted;
  absl::Time admitted = absl::InfiniteFuture();
  absl::Time first_token = absl::InfiniteFuture();
  absl::Time last_token = absl::InfiniteFuture();
};

struct Engine::Impl {
  Impl(LoadedModel* loaded_model, Backend& device, const EngineOptions& opts,
       absl::AnyInvocable<void(const StepReport&)> report, std::unique_ptr<KvCache> kv);

  // --- Engine thread: intake ---
  int MostDecoding() const;  // sequences of a step
  void Rehearse();           // before Loop
  void Loop();
  bool TakeInbox();  // false: stop
  void Admit(Incoming incoming);
  SequenceState MakeChoice(Active& active, int index);
  absl::Status AddChoice(Active& active, int index);
  bool ForkChoice(Active& active, int index, const Sequence& first);

  // --- Engine thread: a step ---
  bool RunStep();  // false: nothing could be done
  void Execute(const Batch& batch);
  bool Failed();
  bool DueForSpans(const Batch& batch);
  void Plan(const Batch& batch, bool sample_spans);
  void DrawTokens(const Batch& batch, const StagedStep& staged, const View& logits);
  TokenLogprob LogprobAt(const View& logits, int row, int32_t token, int top);
  void ReadPromptLogprobs(const BatchItem& item, Active& active, int first_row);
  void Advance(Active& active, Sequence& sequence, absl::Span<Drawn> drawn,
               const std::optional<SpanRow>& row, bool sampled);
  void Take(Active& active, Sequence& sequence, Drawn drawn, const std::optional<SpanRow>& row,
            bool sampled);
  void KeepProbes(Active& active, const SpanRow& row);
  void AddSpans();
  void TellPrompt(Active& active);
  void Finish(Active& active, Sequence& sequence);

  // --- Engine thread: the end of things ---
  void Release(Sequence& sequence);
  void End(const std::string& id, absl::Status status);
  void LeaveQueue(Active& active);
  void Publish();
  bool CleanWhenIdle() const;

  // An observed row of the last step, whose token was taken.
  struct Observation {
    Active* active = nullptr;
    const Sequence* sequence = nullptr;
    SpanRow row;
    bool sampled = false;
  };

  // What one item of a batch belongs to.
  struct Owner {
    Active* active = nullptr;
    Sequence* sequence = nullptr;
  };
  Owner OwnerOf(Ticket ticket) const;

  LoadedModel* loaded;
  Model& model;
  Backend& backend;
  const EngineOptions options;
  RequestLimits limits;
  absl::AnyInvocable<void(const StepReport&)> on_step;
  std::unique_ptr<KvCache> cache;
  Scheduler scheduler;
  TokenDrawer drawer;
  AttentionSpans spans;
  Stager stager;
  absl::flat_hash_map<std::string, std::unique_ptr<Active>> requests;
  absl::flat_hash_map<Ticket, Owner> owners;
  Ticket next_ticket = 1;
  uint64_t next_arrival = 1;
  uint64_t sampling_steps = 0;
  EngineStats local;            // published under mu after each step
  int left_queue_requests = 0;  // since the last Publish()
  int64_t left_queue_tokens = 0;
  // Of a step; members so that they keep their memory.
  std::vector<StageItem> plan;            // by item, and rows of none
  DrawList draws;                         // and edits
  std::vector<size_t> first_draw;         // by item
  std::vector<Drawn> drawn;               // by draw
  std::vector<Observation> observations;  // that AddSpans() has not added yet
  std::vector<float> logit_row;

  // --- Any thread ---
  mutable absl::Mutex mu;
  std::vector<Incoming> inbox ABSL_GUARDED_BY(mu);
  std::vector<std::string> cancels ABSL_GUARDED_BY(mu);
  std::vector<std::pair<absl::Status*, absl::Notification*>> integrity ABSL_GUARDED_BY(mu);
  std::optional<absl::Status> cancel_all ABSL_GUARDED_BY(mu);
  absl::flat_hash_set<std::string> in_flight ABSL_GUARDED_BY(mu);
  int unfinished ABSL_GUARDED_BY(mu) = 0;  // requests whose kFinished has not returned yet
  // Accepted requests none of whose choices ever ran, and their prompts.
  int waiting_requests ABSL_GUARDED_BY(mu) = 0;
  int64_t waiting_tokens ABSL_GUARDED_BY(mu) = 0;
  bool draining ABSL_GUARDED_BY(mu) = false;
  absl::Status failure ABSL_GUARDED_BY(mu);  // of the device; for good
  bool stop ABSL_GUARDED_BY(mu) = false;
  EngineStats stats ABSL_GUARDED_BY(mu);
  absl::BitGen random ABSL_GUARDED_BY(mu);
  std::thread thread;

  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    return stop || !inbox.empty() || !cancels.empty() || !integrity.empty() ||
           cancel_all.has_value();
  }
};

}  // namespace longspan
