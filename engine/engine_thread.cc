// The engine's one thread: take what came in, plan a step, run it, tell the clients.
#include <algorithm>
#include <cassert>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/decode_buckets.h"
#include "engine/engine_impl.h"

namespace longspan {
namespace {

// Submit() has already refused what a full queue cannot take; what was accepted, and its further
// choices, are not refused again.
SchedulerLimits WithoutQueueLimits(SchedulerLimits limits) {
  limits.max_queued_requests = std::numeric_limits<int>::max();
  limits.max_queued_tokens = std::numeric_limits<int64_t>::max();
  return limits;
}

absl::Duration Between(absl::Time begin, absl::Time end) {
  return begin == absl::InfiniteFuture() || end == absl::InfiniteFuture() ? absl::ZeroDuration()
                                                                          : end - begin;
}

bool ReadsPrompt(const BatchItem& item, const Sequence& sequence) {
  return item.count > 1 || sequence.output_tokens() == 0;
}

bool DrawsToken(const BatchItem& item, const Sequence& sequence) {
  return item.begin + item.count == static_cast<int64_t>(sequence.tokens().size());
}

// A row that decodes for no sequence.
StageItem RowOfNone(bool observe) {
  static constexpr int32_t kToken = 0;
  StageItem item;
  item.tokens = absl::MakeConstSpan(&kToken, 1);
  item.wants_logits = true;
  item.observe = observe;
  return item;
}

// A step that only decodes, and observes all or none, gets rows of none up to its bucket.
void FillUp(int most, std::vector<StageItem>* items) {
  const bool observe = items->front().observe;
  for (const StageItem& item : *items) {
    if (item.tokens.size() != 1 || !item.wants_logits || item.observe != observe) return;
  }
  items->resize(DecodeBucket(static_cast<int>(items->size()), most), RowOfNone(observe));
}

// Of one draw: every token seen, every bias and every ban.
size_t MostEdits(const ModelSpec& spec) {
  return spec.vocab + RequestLimits::kMaxBiases + RequestLimits::kMaxStopIds +
         spec.eos_tokens.size();
}

}  // namespace

Engine::Impl::Impl(LoadedModel* loaded_model, Backend& device, const EngineOptions& opts,
                   absl::AnyInvocable<void(const StepReport&)> report, std::unique_ptr<KvCache> kv)
    : loaded(loaded_model),
      model(*loaded_model->model),
      backend(device),
      options(opts),
      on_step(std::move(report)),
      cache(std::move(kv)),
      scheduler(WithoutQueueLimits(opts.limits), cache->numbers()),
      drawer(device, MostEdits(model.spec())),
      spans(model.spec()),
      stager(device, model, opts.limits.max_running) {
  limits.vocab = model.spec().vocab;
  limits.max_context = opts.max_context;
}

Engine::Impl::Owner Engine::Impl::OwnerOf(Ticket ticket) const {
  const auto it = owners.find(ticket);
  CHECK(it != owners.end()) << "ticket " << ticket;
  return it->second;
}

int Engine::Impl::MostDecoding() const {
  return std::min(options.limits.max_running, model.max_rows());
}

// Decoding steps are launched at once from their second time on (Backend::Repeat): here those of
// each bucket come for the first two times, before anyone waits for them.
void Engine::Impl::Rehearse() {
  if (backend.host_memory()) return;
  constexpr int kMostRehearsed = 256;
  for (const int sequences : DecodeBuckets(std::min(kMostRehearsed, MostDecoding()))) {
    for (const bool observe : {false, true}) {
      if (observe && options.spans == SpanLevel::kOff) continue;
      const std::vector<StageItem> items(sequences, RowOfNone(observe));
      for (int time = 0; time < 2; ++time) model.Forward(stager.Stage(items, *cache).step);
    }
  }
}

// --- Intake ---

void Engine::Impl::Loop() {
  while (TakeInbox()) {
    if (scheduler.idle() || RunStep()) continue;
    // Everything waits for memory or time: look again soon, or when something comes in.
    absl::MutexLock lock(&mu);
    mu.AwaitWithTimeout(absl::Condition(this, &Impl::HasWork), absl::Milliseconds(1));
  }
}

bool Engine::Impl::TakeInbox() {
  std::vector<Incoming> incoming;
  std::vector<std::string> cancelled;
  std::vector<std::pair<absl::Status*, absl::Notification*>> checks;
  std::optional<absl::Status> all;
  bool stopping = false;
  assert(!scheduler.idle() || CleanWhenIdle());
  {
    absl::MutexLock lock(&mu);
    if (scheduler.idle()) mu.Await(absl::Condition(this, &Impl::HasWork));
    incoming.swap(inbox);
    cancelled.swap(cancels);
    checks.swap(integrity);
    all.swap(cancel_all);
    stopping = stop;
  }
  for (Incoming& one : incoming) Admit(std::move(one));
  for (const std::string& id : cancelled) {
    if (requests.contains(id)) End(id, absl::CancelledError("cancelled by the client"));
  }
  if (all.has_value()) {
    std::vector<std::string> ids;
    for (const auto& [id, active] : requests) ids.push_back(id);
    for (const std::string& id : ids) End(id, *all);
  }
  for (auto& [status, done] : checks) {
    *status = cache->CheckIntegrity();
    done->Notify();
  }
  if (!incoming.empty()) Publish();
  return !stopping;
}

void Engine::Impl::Admit(Incoming incoming) {
  auto made = std::make_unique<Active>();
  made->request = std::move(incoming.request);
  made->sink = std::move(incoming.sink);
  made->seed = incoming.seed;
  made->submitted = incoming.submitted;
  made->arrival = next_arrival++;
  made->unfinished = static_cast<int>(made->request.n);
  made->choices.resize(made->request.n);
  if (made->request.output.attention_spans) made->spans = EmptySums(model.spec());
  const std::string id = made->request.id;
  Active& active = *requests.emplace(id, std::move(made)).first->second;
  if (absl::Status added = AddChoice(active, 0); !added.ok()) End(id, std::move(added));
}

SequenceState Engine::Impl::MakeChoice(Active& active, int index) {
  active.choices[index] =
      std::make_unique<Sequence>(active.request, index, active.seed, *loaded->tokenizer,
                                 model.spec().vocab, loaded->tokenizer->eos());
  SequenceState state;
  state.ticket = next_ticket++;
  state.priority = active.request.priority;
  state.arrival = active.arrival;
  state.tokens = static_cast<int64_t>(active.request.prompt.size());
  state.max_tokens = state.tokens + active.request.stopping.max_tokens;
  state.deadline = active.request.deadline;
  return state;
}

absl::Status Engine::Impl::AddChoice(Active& active, int index) {
  const SequenceState state = MakeChoice(active, index);
  if (absl::Status added = scheduler.Add(state); !added.ok()) return added;
  Sequence& sequence = *active.choices[index];
  sequence.ticket = state.ticket;
  owners[state.ticket] = {&active, &sequence};
  return absl::OkStatus();
}

// Starts a choice on the pages of the first one, which has just read the prompt. False: there is no
// room for it now.
bool Engine::Impl::ForkChoice(Active& active, int index, const Sequence& first) {
  SequenceState state = MakeChoice(active, index);
  state.computed = state.tokens;
  state.tokens += 1;  // the first token of its own, drawn next
  if (!scheduler.AddRunning(state)) return false;
  Sequence& sequence = *active.choices[index];
  sequence.cache = cache->Fork(first.cache);
  if (sequence.cache < 0) {
    scheduler.Remove(state.ticket);
    return false;
  }
  sequence.ticket = state.ticket;
  owners[state.ticket] = {&active, &sequence};
  local.cached_prompt_tokens += active.request.prompt.size();
  return true;
}

// --- A step ---

bool Engine::Impl::RunStep() {
  const Batch& batch = scheduler.Next(absl::Now());
  for (Ticket ticket : batch.expired) {
    const auto it = owners.find(ticket);
    if (it == owners.end()) continue;  // another choice of its request expired before
    const Active& active = *it->second.active;
    End(active.request.id,
        absl::DeadlineExceededError(absl::StrCat(
            "the deadline passed ", absl::FormatDuration(absl::Now() - active.submitted),
            " after submission, with ", it->second.sequence->output_tokens(), " of ",
            active.request.stopping.max_tokens, " tokens generated")));
  }
  for (Ticket ticket : batch.preempted) {
    const auto it = owners.find(ticket);
    if (it == owners.end()) continue;
    Sequence& sequence = *it->second.sequence;
    if (sequence.cache >= 0) cache->Close(std::exchange(sequence.cache, -1));
    ++local.preemptions;
  }
  for (Ticket ticket : batch.admitted) {
    const auto it = owners.find(ticket);
    if (it == owners.end()) continue;
    it->second.sequence->cache = cache->Open();
    CHECK_GE(it->second.sequence->cache, 0) << "the scheduler admitted more than max_running";
    LeaveQueue(*it->second.active);
  }
  if (!batch.admitted.empty()) Publish();  // the queue is shorter before the step, not after it
  if (!batch.items.empty()) Execute(batch);
  Publish();
  return !batch.items.empty() || !batch.expired.empty();
}

void Engine::Impl::Execute(const Batch& batch) {
  const absl::Time begin = absl::Now();
  const bool sample_spans = DueForSpans(batch);
  Plan(batch, sample_spans);
  if (!backend.host_memory()) FillUp(MostDecoding(), &plan);
  const StagedStep& staged = stager.Stage(plan, *cache);
  const View logits = model.Forward(staged.step);
  AddSpans();  // of the step before, while the device is at this one
  ++local.steps;

  StepReport report;
  bool reads_prompt_rows = false;
  for (size_t i = 0; i < batch.items.size(); ++i) {
    const BatchItem& item = batch.items[i];
    const auto [active, sequence] = OwnerOf(item.ticket);
    cache->Commit(sequence->cache, item.begin + item.count);
    local.step_rows += item.count;
    (ReadsPrompt(item, *sequence) ? report.prefill_tokens : report.decode_tokens) += item.count;
    reads_prompt_rows |= active->request.output.prompt_logprobs.has_value() && !active->prompt_done;
  }
  DrawTokens(batch, staged, logits);
  if (Failed()) return;
  for (size_t i = 0; reads_prompt_rows && i < batch.items.size(); ++i) {
    Active& active = *OwnerOf(batch.items[i].ticket).active;
    if (!active.request.output.prompt_logprobs.has_value() || active.prompt_done) continue;
    ReadPromptLogprobs(batch.items[i], active, staged.first_row[i]);
  }
  if (Failed()) return;
  if (sample_spans) spans.CountStep(/*observed=*/true);

  for (size_t i = 0; i < batch.items.size(); ++i) {
    const auto [active, sequence] = OwnerOf(batch.items[i].ticket);
    scheduler.Commit(batch.items[i], plan[i].wants_logits ? 1 : 0);
    if (!plan[i].wants_logits) continue;
    std::optional<SpanRow> row;
    if (staged.observed[i] >= 0) row = stager.Records(staged, staged.observed[i]);
    Advance(*active, *sequence, absl::MakeSpan(drawn).subspan(first_draw[i]), row, sample_spans);
  }
  report.duration = absl::Now() - begin;
  local.step_seconds += absl::ToDoubleSeconds(report.duration);
  if (on_step) on_step(report);
}

// True once the device has failed: its caches and results are worth nothing, so that all in flight
// end and no new request is taken.
bool Engine::Impl::Failed() {
  const std::string fault = backend.Fault();
  if (fault.empty()) return false;
  const absl::Status status = absl::UnavailableError(absl::StrCat(backend.name(), ": ", fault));
  {
    absl::MutexLock lock(&mu);
    draining = true;
    failure = status;
  }
  std::vector<std::string> ids;
  for (const auto& [id, active] : requests) ids.push_back(id);
  for (const std::string& id : ids) End(id, status);
  if (options.on_failure) options.on_failure();
  return true;
}

// One in span_every of the steps that draw a token.
bool Engine::Impl::DueForSpans(const Batch& batch) {
  if (options.spans == SpanLevel::kOff) return false;
  const bool draws = std::any_of(
      batch.items.begin(), batch.items.end(),
      [&](const BatchItem& item) { return DrawsToken(item, *OwnerOf(item.ticket).sequence); });
  return draws && sampling_steps++ % static_cast<uint64_t>(options.span_every) == 0;
}

void Engine::Impl::Plan(const Batch& batch, bool sample_spans) {
  plan.clear();
  for (const BatchItem& item : batch.items) {
    const auto [active, sequence] = OwnerOf(item.ticket);
    CHECK(cache->Reserve(sequence->cache, item.begin + item.count)) << "ticket " << item.ticket;
    StageItem& staged = plan.emplace_back();
    staged.cache = sequence->cache;
    staged.begin = item.begin;
    staged.tokens = absl::MakeConstSpan(sequence->tokens()).subspan(item.begin, item.count);
    staged.wants_logits = DrawsToken(item, *sequence);
    if (!staged.wants_logits || options.spans == SpanLevel::kOff) continue;
    const bool probed = !active->prompt_done && !active->request.probes.empty();
    staged.observe = probed || sample_spans || active->spans.has_value();
    if (probed) staged.probes = active->request.probes;
  }
}

// The tokens of the step, before Model::Logits overwrites its logits. Item i's begin at
// first_draw[i]: one for each choice that a prompt's end begins, else one.
void Engine::Impl::DrawTokens(const Batch& batch, const StagedStep& staged, const View& logits) {
  draws.Clear();
  first_draw.clear();
  for (size_t i = 0; i < batch.items.size(); ++i) {
    first_draw.push_back(draws.draws.size());
    if (staged.logit_row[i] < 0) continue;
    const auto [active, sequence] = OwnerOf(batch.items[i].ticket);
    sequence->AddDraw(staged.logit_row[i], sequence->index(), &draws);
    for (int choice = 1; !active->prompt_done && choice < active->request.n; ++choice) {
      sequence->AddDraw(staged.logit_row[i], choice, &draws);
    }
  }
  drawn.clear();
  for (const int32_t token : drawer.Tokens(logits, draws)) drawn.emplace_back().token = token;
  for (size_t i = 0; i < batch.items.size() && backend.Fault().empty(); ++i) {
    const std::optional<int64_t> top =
        OwnerOf(batch.items[i].ticket).active->request.output.logprobs;
    if (!top.has_value()) continue;
    const size_t end = i + 1 < batch.items.size() ? first_draw[i + 1] : drawn.size();
    for (size_t d = first_draw[i]; d < end; ++d) {
      drawn[d].logprob =
          LogprobAt(logits, draws.draws[d].row, drawn[d].token, static_cast<int>(*top));
    }
  }
}

TokenLogprob Engine::Impl::LogprobAt(const View& logits, int row, int32_t token, int top) {
  const View own = View::Vector(logits.row(row), logits.dtype, logits.shape[1]);
  const float* values = own.as<float>();
  if (!backend.host_memory()) {
    logit_row.resize(own.elements());
    backend.CopyOut(logit_row.data(), own.data, own.bytes());
    values = logit_row.data();
  }
  return LogprobOf(absl::MakeConstSpan(values, own.elements()), token, top);
}

void Engine::Impl::ReadPromptLogprobs(const BatchItem& item, Active& active, int first_row) {
  const std::vector<int32_t>& prompt = active.request.prompt;
  const int top = static_cast<int>(*active.request.output.prompt_logprobs);
  const int64_t vocab = model.spec().vocab;
  // Nothing comes before token 0.
  if (active.prompt_logprobs.empty()) active.prompt_logprobs.emplace_back();
  // Row r predicts the token after it. A preempted prompt is read again: what is known is skipped.
  const int64_t end =
      std::min<int64_t>(item.begin + item.count, static_cast<int64_t>(prompt.size()) - 1);
  int64_t position =
      std::max<int64_t>(item.begin, static_cast<int64_t>(active.prompt_logprobs.size()) - 1);
  std::vector<float> copy;
  while (position < end) {
    const int count = static_cast<int>(std::min<int64_t>(end - position, model.max_logit_rows()));
    const View logits =
        model.Logits(stager.RowRange(first_row + static_cast<int>(position - item.begin), count));
    const float* rows = logits.as<float>();
    if (!backend.host_memory()) {
      copy.resize(logits.elements());
      backend.CopyOut(copy.data(), logits.data, logits.bytes());
      rows = copy.data();
    }
    for (int r = 0; r < count; ++r, ++position) {
      active.prompt_logprobs.push_back(
          LogprobOf(absl::MakeConstSpan(rows + r * vocab, vocab), prompt[position + 1], top));
    }
  }
}

// Takes a sequence's next token, at its prompt's end that of each choice, and ends what is at its
// end. row: that they were drawn from, if it is observed.
void Engine::Impl::Advance(Active& active, Sequence& sequence, absl::Span<Drawn> drawn,
                           const std::optional<SpanRow>& row, bool sampled) {
  const bool ends_prompt = !active.prompt_done;
  Take(active, sequence, std::move(drawn[0]), row, sampled);
  for (int i = 1; ends_prompt && i < active.request.n; ++i) {
    if (ForkChoice(active, i, sequence)) {
      Sequence& sibling = *active.choices[i];
      Take(active, sibling, std::move(drawn[i]), row, sampled);
      if (sibling.finished()) Finish(active, sibling);
    } else {  // it reads the prompt itself when its turn comes
      const absl::Status added = AddChoice(active, i);
      CHECK(added.ok()) << added;  // its like, the first choice, was taken
    }
  }
  if (sequence.finished()) Finish(active, sequence);
}

// Tells the client of its next token.
void Engine::Impl::Take(Active& active, Sequence& sequence, Drawn drawn,
                        const std::optional<SpanRow>& row, bool sampled) {
  Event event = sequence.Next(std::move(drawn));
  const absl::Time now = absl::Now();
  active.first_token = std::min(active.first_token, now);
  active.last_token = now;
  ++local.generation_tokens;
  if (row.has_value()) {
    if (!active.prompt_done && !active.request.probes.empty()) KeepProbes(active, *row);
    observations.push_back({&active, &sequence, *row, sampled});
  }
  if (!active.prompt_done) TellPrompt(active);
  active.sink(std::move(event));
}

void Engine::Impl::TellPrompt(Active& active) {
  active.prompt_done = true;
  local.prompt_tokens += active.request.prompt.size();
  Event prompt;
  prompt.kind = Event::Kind::kPrompt;
  prompt.prompt_tokens = static_cast<int>(active.request.prompt.size());
  prompt.logprobs = std::move(active.prompt_logprobs);
  active.sink(std::move(prompt));
}

void Engine::Impl::KeepProbes(Active& active, const SpanRow& row) {
  const std::vector<LayerSpec>& layers = model.spec().layers;
  stager.AwaitRecords();
  active.probe_mass.assign(layers.size(), std::vector<float>(model.max_heads()));
  for (size_t l = 0; l < layers.size(); ++l) {
    const int heads = std::get<AttentionSpec>(layers[l].mixer).heads;
    const SpanRecord* records = row.Layer(static_cast<int>(l), heads);
    for (int h = 0; h < heads; ++h) active.probe_mass[l][h] = records[h].probe_mass;
  }
}

// To be called before one of the observed sequences takes another token or its request ends.
void Engine::Impl::AddSpans() {
  stager.AwaitRecords();
  for (const auto& [active, sequence, row, sampled] : observations) {
    // The sequence already ends with the token that was drawn; the row is that of the one before.
    const auto tokens =
        absl::MakeConstSpan(sequence->tokens()).first(sequence->tokens().size() - 1);
    const int32_t next = sequence->tokens().back();
    const int64_t position = static_cast<int64_t>(tokens.size()) - 1;
    if (sampled) {
      spans.Add(row, position, tokens, next);
      if (!std::exchange(active->counted_in_spans, true)) spans.CountRequest();
    }
    if (active->spans.has_value()) {
      AddRow(model.spec(), row, position, tokens, next, *active->spans);
    }
  }
  observations.clear();
}

// --- The end of things ---

void Engine::Impl::Finish(Active& active, Sequence& sequence) {
  Release(sequence);
  if (--active.unfinished == 0) End(active.request.id, absl::OkStatus());
}

void Engine::Impl::Release(Sequence& sequence) {
  if (sequence.cache >= 0) cache->Close(std::exchange(sequence.cache, -1));
  if (sequence.ticket == 0) return;
  if (scheduler.Find(sequence.ticket).has_value()) scheduler.Remove(sequence.ticket);
  owners.erase(std::exchange(sequence.ticket, 0));
}

void Engine::Impl::End(const std::string& id, absl::Status status) {
  const auto it = requests.find(id);
  CHECK(it != requests.end()) << id;
  AddSpans();
  const std::unique_ptr<Active> active = std::move(it->second);
  requests.erase(it);
  LeaveQueue(*active);
  Event finished;
  finished.kind = Event::Kind::kFinished;
  bool stopped = false;
  for (size_t i = 0; i < active->choices.size(); ++i) {
    Event last;
    last.index = static_cast<int>(i);
    last.finish = FinishReason::kCancelled;
    if (Sequence* choice = active->choices[i].get(); choice != nullptr) {
      finished.completion_tokens += choice->output_tokens();
      stopped |= choice->finish() == FinishReason::kStop;
      Release(*choice);
      if (choice->finished()) continue;
      last = choice->Cancelled();
    }
    active->sink(std::move(last));
  }
  if (status.ok()) {
    ++(stopped ? local.finished_stop : local.finished_length);
  } else if (absl::IsCancelled(status)) {
    ++local.cancelled;
  } else if (absl::IsDeadlineExceeded(status)) {
    ++local.deadline_exceeded;
  } else {
    ++local.failed;
  }
  finished.status = std::move(status);
  finished.prompt_tokens = static_cast<int>(active->request.prompt.size());
  finished.timings.queued = Between(active->submitted, active->admitted);
  finished.timings.prefill = Between(active->admitted, active->first_token);
  finished.timings.time_to_first_token = Between(active->submitted, active->first_token);
  finished.timings.decode = Between(active->first_token, active->last_token);
  finished.spans = std::move(active->spans);
  finished.probe_mass = std::move(active->probe_mass);
  Publish();
  {
    // From here on the id may be used again; a late Cancel() of this request must not hit that one.
    absl::MutexLock lock(&mu);
    in_flight.erase(active->request.id);
    cancels.erase(std::remove(cancels.begin(), cancels.end(), active->request.id), cancels.end());
  }
  active->sink(std::move(finished));
  absl::MutexLock lock(&mu);
  --unfinished;
}

// A request waits until its first choice runs for the first time.
void Engine::Impl::LeaveQueue(Active& active) {
  if (active.admitted != absl::InfiniteFuture()) return;
  active.admitted = absl::Now();
  ++left_queue_requests;
  left_queue_tokens += static_cast<int64_t>(active.request.prompt.size());
}

void Engine::Impl::Publish() {
  local.running = scheduler.running();
  local.queued = scheduler.queued();
  local.cache = cache->Usage();
  absl::MutexLock lock(&mu);
  waiting_requests -= std::exchange(left_queue_requests, 0);
  waiting_tokens -= std::exchange(left_queue_tokens, 0);
  stats = local;
}

bool Engine::Impl::CleanWhenIdle() const {
  return requests.empty() && owners.empty() && cache->Usage().used_bytes == 0 &&
         cache->CheckIntegrity().ok();
}

}  // namespace longspan
