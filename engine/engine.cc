#include "engine/engine.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "engine/sampler.h"
#include "engine/sequence.h"
#include "engine/stager.h"
#include "engine/validate.h"

namespace longspan {
namespace {

constexpr int64_t kDefaultCacheBytes = int64_t{512} << 20;

// A request in flight, with its choices. Engine thread.
struct Active {
  Request request;
  EventSink sink;
  uint64_t seed = 0;
  uint64_t arrival = 0;
  std::vector<std::unique_ptr<Sequence>> choices;
  int unfinished = 0;
  bool prompt_done = false;
  std::vector<TokenLogprob> prompt_logprobs;
  std::optional<SpanSums> spans;
  std::vector<std::vector<float>> probe_mass;
  absl::Time submitted;
  absl::Time admitted = absl::InfiniteFuture();
  absl::Time first_token = absl::InfiniteFuture();
  absl::Time last_token = absl::InfiniteFuture();
};

struct Incoming {
  Request request;
  EventSink sink;
  uint64_t seed = 0;
  absl::Time submitted;
};

absl::Duration Between(absl::Time begin, absl::Time end) {
  return begin == absl::InfiniteFuture() || end == absl::InfiniteFuture() ? absl::ZeroDuration()
                                                                          : end - begin;
}

}  // namespace

struct Engine::Impl {
  Impl(LoadedModel* loaded_model, Backend& device, const EngineOptions& opts,
       absl::AnyInvocable<void(const StepReport&)> report, std::unique_ptr<KvCache> kv)
      : loaded(loaded_model),
        model(*loaded_model->model),
        backend(device),
        options(opts),
        on_step(std::move(report)),
        cache(std::move(kv)),
        scheduler(opts.limits, CacheNumbersOf(*cache)),
        spans(model.spec()),
        stager(device, model, opts.limits.max_running) {
    limits.vocab = model.spec().vocab;
    limits.max_context = opts.max_context;
  }

  // --- Engine thread ---------------------------------------------------------------------------
  void Loop();
  bool TakeInbox();
  void Admit(Incoming incoming);
  void AddChoice(Active& active, int index);
  void RunStep();
  void Execute(const Batch& batch);
  std::vector<StageItem> Plan(const Batch& batch, bool sample_spans);
  void ReadPromptLogprobs(const BatchItem& item, Active& active, int first_row);
  void Observe(const StagedStep& staged, size_t item, bool sampled, Active& active,
               Sequence& sequence, bool ends_prompt, int32_t next);
  void FinishPrompt(Active& active);
  void Release(Sequence& sequence);
  void End(const std::string& id, absl::Status status);
  void Publish();

  // What one item of a batch belongs to.
  struct Owner {
    Active* active = nullptr;
    Sequence* sequence = nullptr;
  };
  Owner OwnerOf(Ticket ticket) {
    const auto it = owners.find(ticket);
    CHECK(it != owners.end()) << "ticket " << ticket;
    return it->second;
  }

  LoadedModel* loaded;
  Model& model;
  Backend& backend;
  EngineOptions options;
  RequestLimits limits;
  absl::AnyInvocable<void(const StepReport&)> on_step;
  std::unique_ptr<KvCache> cache;
  Scheduler scheduler;
  Sampler sampler;
  AttentionSpans spans;
  Stager stager;
  absl::flat_hash_map<std::string, std::unique_ptr<Active>> requests;
  absl::flat_hash_map<Ticket, Owner> owners;
  Ticket next_ticket = 1;
  uint64_t next_arrival = 1;
  uint64_t decode_steps = 0;
  EngineStats local;  // published under mu after each step
  std::vector<float> logits_copy;

  // --- Any thread --------------------------------------------------------------------------------
  mutable absl::Mutex mu;
  std::vector<Incoming> inbox ABSL_GUARDED_BY(mu);
  std::vector<std::string> cancels ABSL_GUARDED_BY(mu);
  std::vector<std::pair<absl::Status*, absl::Notification*>> integrity ABSL_GUARDED_BY(mu);
  std::optional<absl::Status> cancel_all ABSL_GUARDED_BY(mu);
  absl::flat_hash_set<std::string> in_flight ABSL_GUARDED_BY(mu);
  int unfinished ABSL_GUARDED_BY(mu) = 0;  // requests whose kFinished has not returned yet
  int64_t inbox_tokens ABSL_GUARDED_BY(mu) = 0;
  bool draining ABSL_GUARDED_BY(mu) = false;
  bool stop ABSL_GUARDED_BY(mu) = false;
  EngineStats stats ABSL_GUARDED_BY(mu);
  absl::BitGen random ABSL_GUARDED_BY(mu);
  std::thread thread;

  bool HasWork() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    return stop || !inbox.empty() || !cancels.empty() || !integrity.empty() ||
           cancel_all.has_value();
  }
  static CacheNumbers CacheNumbersOf(const KvCache& cache) {
    return {cache.shape(), cache.superblock_bytes(), cache.Usage().superblocks_total};
  }
};

// --- Engine thread: intake -----------------------------------------------------------------------

void Engine::Impl::Loop() {
  while (TakeInbox()) {
    if (!scheduler.idle()) RunStep();
  }
}

bool Engine::Impl::TakeInbox() {
  std::vector<Incoming> incoming;
  std::vector<std::string> cancelled;
  std::vector<std::pair<absl::Status*, absl::Notification*>> checks;
  std::optional<absl::Status> all;
  bool stopping = false;
  {
    absl::MutexLock lock(&mu);
    if (scheduler.idle()) mu.Await(absl::Condition(this, &Impl::HasWork));
    incoming.swap(inbox);
    inbox_tokens = 0;
    cancelled.swap(cancels);
    checks.swap(integrity);
    all.swap(cancel_all);
    stopping = stop;
    // What left the inbox is queued from here on, before the scheduler's own count is published.
    for (const Incoming& one : incoming) {
      stats.queued += one.request.n;
      stats.queued_tokens += static_cast<int64_t>(one.request.prompt.size());
    }
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
  if (!incoming.empty() || !cancelled.empty() || all.has_value()) Publish();
  return !stopping;
}

void Engine::Impl::Admit(Incoming incoming) {
  auto active = std::make_unique<Active>();
  active->request = std::move(incoming.request);
  active->sink = std::move(incoming.sink);
  active->seed = incoming.seed;
  active->submitted = incoming.submitted;
  active->arrival = next_arrival++;
  active->unfinished = active->request.n;
  if (active->request.output.attention_spans) active->spans = EmptySums(model.spec());
  const std::string id = active->request.id;
  Active& placed = *requests.emplace(id, std::move(active)).first->second;
  for (int i = 0; i < placed.request.n; ++i) {
    placed.choices.push_back(std::make_unique<Sequence>(placed.request, i, placed.seed,
                                                        *loaded->tokenizer, model.spec().vocab,
                                                        loaded->tokenizer->eos()));
  }
  // The other choices follow when the first has read the prompt: see FinishPrompt.
  AddChoice(placed, 0);
}

void Engine::Impl::AddChoice(Active& active, int index) {
  Sequence& sequence = *active.choices[index];
  sequence.ticket = next_ticket++;
  SequenceState state;
  state.ticket = sequence.ticket;
  state.priority = active.request.priority;
  state.arrival = active.arrival;
  state.tokens = static_cast<int64_t>(sequence.tokens().size());
  state.max_tokens = state.tokens + active.request.stopping.max_tokens;
  state.deadline = active.request.deadline;
  owners[sequence.ticket] = {&active, &sequence};
  // Submit() has refused what can never fit and what a full queue cannot take; choices of an
  // accepted request are not counted again.
  const absl::Status added = scheduler.Add(state);
  if (!added.ok()) {
    owners.erase(sequence.ticket);
    sequence.ticket = 0;
    End(active.request.id, added);
  }
}

// --- Engine thread: a step
// -------------------------------------------------------------------------

void Engine::Impl::RunStep() {
  const Batch batch = scheduler.Next(absl::Now());
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
    Active& active = *it->second.active;
    active.admitted = std::min(active.admitted, absl::Now());
  }
  if (!batch.items.empty()) Execute(batch);
  Publish();
}

std::vector<StageItem> Engine::Impl::Plan(const Batch& batch, bool sample_spans) {
  std::vector<StageItem> plan;
  for (const BatchItem& item : batch.items) {
    const auto [active, sequence] = OwnerOf(item.ticket);
    CHECK(cache->Reserve(sequence->cache, item.begin + item.count)) << "ticket " << item.ticket;
    StageItem& staged = plan.emplace_back();
    staged.cache = sequence->cache;
    staged.begin = item.begin;
    staged.tokens = absl::MakeConstSpan(sequence->tokens()).subspan(item.begin, item.count);
    staged.wants_logits =
        item.begin + item.count == static_cast<int64_t>(sequence->tokens().size());
    const bool decodes = staged.wants_logits && sequence->output_tokens() > 0;
    const bool ends_prompt = staged.wants_logits && sequence->output_tokens() == 0;
    const bool probed = ends_prompt && !active->request.probes.empty();
    staged.observe = probed || (decodes && (sample_spans || active->spans.has_value()));
    if (probed) staged.probes = active->request.probes;
  }
  return plan;
}

void Engine::Impl::Execute(const Batch& batch) {
  const absl::Time begin = absl::Now();
  bool decodes = false;
  for (const BatchItem& item : batch.items) {
    decodes |= OwnerOf(item.ticket).sequence->output_tokens() > 0;
  }
  const bool sample_spans = options.spans != SpanLevel::kOff && decodes &&
                            decode_steps++ % static_cast<uint64_t>(options.span_every) == 0;
  const std::vector<StageItem> plan = Plan(batch, sample_spans);
  const StagedStep staged = stager.Stage(plan, *cache);
  const View logits = model.Forward(staged.step);
  const int64_t vocab = model.spec().vocab;
  logits_copy.resize(logits.elements());
  if (!logits_copy.empty()) backend.CopyOut(logits_copy.data(), logits.data, logits.bytes());
  if (sample_spans) spans.CountStep(/*observed=*/true);

  StepReport report;
  for (size_t i = 0; i < batch.items.size(); ++i) {
    const BatchItem& item = batch.items[i];
    (plan[i].wants_logits && OwnerOf(item.ticket).sequence->output_tokens() > 0
         ? report.decode_tokens
         : report.prefill_tokens) += item.count;
    cache->Commit(plan[i].cache, item.begin + item.count);
    const Owner owner = OwnerOf(item.ticket);
    if (owner.active->request.output.prompt_logprobs.has_value() && !owner.active->prompt_done) {
      ReadPromptLogprobs(item, *owner.active, staged.first_row[i]);
    }
  }
  local.prompt_tokens += report.prefill_tokens;
  // Sinks may not call back into the engine thread, but ending one request must not disturb the
  // rest: owners are looked up again for each item.
  for (size_t i = 0; i < batch.items.size(); ++i) {
    const BatchItem& item = batch.items[i];
    const auto it = owners.find(item.ticket);
    if (it == owners.end()) continue;
    Active& active = *it->second.active;
    Sequence& sequence = *it->second.sequence;
    if (!plan[i].wants_logits) {
      scheduler.Commit(item, 0);
      continue;
    }
    const bool ends_prompt = sequence.output_tokens() == 0;
    const absl::Time now = absl::Now();
    active.first_token = std::min(active.first_token, now);
    active.last_token = now;
    Event event = sequence.Next(
        sampler, absl::MakeConstSpan(logits_copy).subspan(staged.logit_row[i] * vocab, vocab));
    ++local.generation_tokens;
    if (staged.observed[i] >= 0) {
      Observe(staged, i, sample_spans, active, sequence, ends_prompt, event.tokens[0]);
    }
    scheduler.Commit(item, 1);
    const bool first_of_request = ends_prompt && !active.prompt_done;
    if (first_of_request) {
      Event prompt;
      prompt.kind = Event::Kind::kPrompt;
      prompt.prompt_tokens = static_cast<int>(active.request.prompt.size());
      prompt.logprobs = std::move(active.prompt_logprobs);
      active.sink(std::move(prompt));
    }
    const FinishReason finish = event.finish;
    active.sink(std::move(event));
    if (finish != FinishReason::kNone) {
      (finish == FinishReason::kStop ? local.finished_stop : local.finished_length) += 1;
      Release(sequence);
      --active.unfinished;
    }
    if (first_of_request) {
      FinishPrompt(active);
    } else if (active.unfinished == 0) {
      End(active.request.id, absl::OkStatus());
    }
  }
  report.duration = absl::Now() - begin;
  ++local.steps;
  local.step_rows += staged.step.batch.rows;
  local.step_seconds += absl::ToDoubleSeconds(report.duration);
  if (on_step) on_step(report);
}

// Other choices start once the prompt was read, so that prompt events come first and the first
// answer is not delayed by its siblings.
void Engine::Impl::FinishPrompt(Active& active) {
  active.prompt_done = true;
  const std::string id = active.request.id;
  for (int i = 1; i < active.request.n; ++i) {
    AddChoice(active, i);
    if (!requests.contains(id)) return;  // it could not be queued and was ended
  }
  if (active.unfinished == 0) End(id, absl::OkStatus());
}

void Engine::Impl::ReadPromptLogprobs(const BatchItem& item, Active& active, int first_row) {
  const std::vector<int32_t>& prompt = active.request.prompt;
  const int top = *active.request.output.prompt_logprobs;
  const int64_t vocab = model.spec().vocab;
  if (active.prompt_logprobs.empty())
    active.prompt_logprobs.emplace_back();  // nothing before token 0
  // Row r predicts the token after it. A preempted prompt is read again: what is known is skipped.
  const int64_t end =
      std::min<int64_t>(item.begin + item.count, static_cast<int64_t>(prompt.size()) - 1);
  int64_t position =
      std::max<int64_t>(item.begin, static_cast<int64_t>(active.prompt_logprobs.size()) - 1);
  std::vector<float> rows;
  while (position < end) {
    const int count = static_cast<int>(std::min<int64_t>(end - position, model.max_logit_rows()));
    const View logits =
        model.Logits(stager.RowRange(first_row + static_cast<int>(position - item.begin), count));
    rows.resize(logits.elements());
    backend.CopyOut(rows.data(), logits.data, logits.bytes());
    for (int r = 0; r < count; ++r, ++position) {
      active.prompt_logprobs.push_back(LogprobOf(
          absl::MakeConstSpan(rows).subspan(r * vocab, vocab), prompt[position + 1], top));
    }
  }
}

void Engine::Impl::Observe(const StagedStep& staged, size_t item, bool sampled, Active& active,
                           Sequence& sequence, bool ends_prompt, int32_t next) {
  const std::vector<SpanRecord>& records = stager.Records(staged, staged.observed[item]);
  // The sequence already ends with `next`; the observed row is the token before it.
  const auto tokens = absl::MakeConstSpan(sequence.tokens()).first(sequence.tokens().size() - 1);
  const int64_t position = static_cast<int64_t>(tokens.size()) - 1;
  if (ends_prompt) {
    const int heads = model.max_heads();
    active.probe_mass.assign(model.spec().layers.size(), std::vector<float>(heads));
    for (size_t l = 0; l < active.probe_mass.size(); ++l) {
      for (int h = 0; h < heads; ++h) active.probe_mass[l][h] = records[l * heads + h].probe_mass;
    }
    return;
  }
  if (sampled) {
    spans.Add(records, position, tokens, next);
    if (!std::exchange(sequence.counted_in_spans, true)) spans.CountRequest();
  }
  if (active.spans.has_value()) {
    AddRow(model.spec(), records, position, tokens, next, *active.spans);
  }
}

// --- Engine thread: the end of things
// ----------------------------------------------------------------

void Engine::Impl::Release(Sequence& sequence) {
  if (sequence.cache >= 0) cache->Close(std::exchange(sequence.cache, -1));
  if (sequence.ticket != 0) {
    if (scheduler.Find(sequence.ticket).has_value()) scheduler.Remove(sequence.ticket);
    owners.erase(std::exchange(sequence.ticket, 0));
  }
}

void Engine::Impl::End(const std::string& id, absl::Status status) {
  const auto it = requests.find(id);
  CHECK(it != requests.end()) << id;
  const std::unique_ptr<Active> active = std::move(it->second);
  requests.erase(it);
  Event finished;
  finished.kind = Event::Kind::kFinished;
  for (const auto& choice : active->choices) {
    finished.completion_tokens += choice->output_tokens();
    Release(*choice);
    if (!choice->finished() && !status.ok()) active->sink(choice->Cancelled());
  }
  if (absl::IsCancelled(status)) {
    ++local.cancelled;
  } else if (absl::IsDeadlineExceeded(status)) {
    ++local.deadline_exceeded;
  } else if (!status.ok()) {
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
  {
    absl::MutexLock lock(&mu);
    in_flight.erase(active->request.id);
  }
  Publish();
  active->sink(std::move(finished));
  absl::MutexLock lock(&mu);
  --unfinished;
}

void Engine::Impl::Publish() {
  local.running = scheduler.running();
  local.queued = scheduler.queued();
  local.queued_tokens = scheduler.queued_tokens();
  local.cache = cache->Usage();
  absl::MutexLock lock(&mu);
  const uint64_t never = stats.refused_never_fits;
  const uint64_t full = stats.refused_queue_full;
  stats = local;
  stats.refused_never_fits = never;
  stats.refused_queue_full = full;
}

// --- Any thread
// --------------------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(
    LoadedModel* model, Backend& backend, const EngineOptions& given,
    absl::AnyInvocable<void(const StepReport&)> on_step) {
  EngineOptions options = given;
  const Model& m = *model->model;
  if (options.max_context <= 0) options.max_context = m.spec().max_context;
  options.max_context = std::min(options.max_context, m.spec().max_context);
  if (options.span_every < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("attention-sample-every is ", options.span_every, ", must be at least 1"));
  }
  if (options.limits.max_batched_tokens < 1 || options.limits.max_batched_tokens > m.max_rows()) {
    return absl::InvalidArgumentError(absl::StrCat("max-batched-tokens is ",
                                                   options.limits.max_batched_tokens,
                                                   ", must be from 1 to ", m.max_rows()));
  }
  if (options.limits.max_running < 1 || options.limits.max_running > m.max_logit_rows()) {
    return absl::InvalidArgumentError(absl::StrCat("max-running is ", options.limits.max_running,
                                                   ", must be from 1 to ", m.max_logit_rows()));
  }
  if (options.cache_bytes <= 0) {
    const CacheShape shape = ShapeOf(m.spec(), m.cache_dtype(), options.page_tokens);
    const int64_t superblock =
        Arena::SuperblockBytes({shape.paged_page_bytes, shape.ring_page_bytes});
    // One whole context, each kind rounded up to superblocks.
    options.cache_bytes = std::max(
        kDefaultCacheBytes, DemandOf(shape, options.max_context).bytes * 65 / 64 + 2 * superblock);
  }
  auto cache =
      KvCache::Create(backend, m.spec(), m.cache_dtype(), options.page_tokens, options.cache_bytes,
                      options.limits.max_running, options.max_context);
  if (!cache.ok()) return cache.status();
  auto impl =
      std::make_unique<Impl>(model, backend, options, std::move(on_step), *std::move(cache));
  impl->Publish();
  Impl* running = impl.get();
  std::unique_ptr<Engine> engine(new Engine(std::move(impl)));
  running->thread = std::thread([running] { running->Loop(); });
  return engine;
}

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Engine::~Engine() {
  {
    absl::MutexLock lock(&impl_->mu);
    impl_->draining = true;
    impl_->cancel_all = absl::UnavailableError("the server is shutting down");
    impl_->stop = true;
  }
  impl_->thread.join();
}

absl::Status Engine::Submit(Request request, EventSink sink) {
  if (absl::Status valid = Validate(request, impl_->limits); !valid.ok()) return valid;
  const int64_t most = static_cast<int64_t>(request.prompt.size()) + request.stopping.max_tokens;
  const bool fits = impl_->cache->CouldEverFit(most);
  const SchedulerLimits& limits = impl_->options.limits;

  absl::MutexLock lock(&impl_->mu);
  if (impl_->stop || impl_->draining) return absl::UnavailableError("the server is draining");
  if (!fits) {
    ++impl_->stats.refused_never_fits;
    const CacheDemand demand = DemandOf(impl_->cache->shape(), most);
    return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                          "can never fit: ", most, " tokens need ", demand.paged_pages, " paged + ",
                          demand.ring_pages, " ring pages = ", demand.bytes,
                          " bytes, the cache holds ", impl_->stats.cache.total_bytes)),
                      "NEVER_FITS");
  }
  const int64_t queued = impl_->stats.queued + static_cast<int64_t>(impl_->inbox.size());
  if (queued >= limits.max_queued_requests) {
    ++impl_->stats.refused_queue_full;
    return WithReason(absl::ResourceExhaustedError(absl::StrCat("queue is full: ", queued,
                                                                " requests wait, the limit is ",
                                                                limits.max_queued_requests)),
                      "QUEUE_FULL");
  }
  const int64_t tokens = static_cast<int64_t>(request.prompt.size());
  const int64_t queued_tokens = impl_->stats.queued_tokens + impl_->inbox_tokens;
  if (queued_tokens + tokens > limits.max_queued_tokens) {
    ++impl_->stats.refused_queue_full;
    return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                          "queue is full: ", queued_tokens, " tokens wait and the request has ",
                          tokens, ", the limit is ", limits.max_queued_tokens)),
                      "QUEUE_FULL");
  }
  if (!impl_->in_flight.insert(request.id).second) {
    return absl::AlreadyExistsError(absl::StrCat("request_id: ", request.id, " is in flight"));
  }
  ++impl_->unfinished;
  impl_->inbox_tokens += tokens;
  Incoming incoming;
  incoming.seed = request.sampling.seed.has_value() ? *request.sampling.seed
                                                    : absl::Uniform<uint64_t>(impl_->random);
  incoming.request = std::move(request);
  incoming.sink = std::move(sink);
  incoming.submitted = absl::Now();
  impl_->inbox.push_back(std::move(incoming));
  return absl::OkStatus();
}

bool Engine::Cancel(const std::string& id) {
  absl::MutexLock lock(&impl_->mu);
  if (!impl_->in_flight.contains(id)) return false;
  impl_->cancels.push_back(id);
  return true;
}

void Engine::CancelAll(absl::Status why) {
  CHECK(!why.ok());
  absl::MutexLock lock(&impl_->mu);
  impl_->cancel_all = std::move(why);
}

void Engine::Drain() {
  absl::MutexLock lock(&impl_->mu);
  impl_->draining = true;
}

void Engine::Resume() {
  absl::MutexLock lock(&impl_->mu);
  impl_->draining = false;
}

bool Engine::Idle() const {
  absl::MutexLock lock(&impl_->mu);
  return impl_->unfinished == 0;
}

bool Engine::WaitIdle(absl::Duration timeout) const {
  absl::MutexLock lock(&impl_->mu);
  return impl_->mu.AwaitWithTimeout(
      absl::Condition(
          +[](int* unfinished) { return *unfinished == 0; }, &impl_->unfinished),
      timeout);
}

EngineStats Engine::Stats() const {
  absl::MutexLock lock(&impl_->mu);
  EngineStats stats = impl_->stats;
  stats.queued += static_cast<int>(impl_->inbox.size());
  stats.queued_tokens += impl_->inbox_tokens;
  stats.draining = impl_->draining;
  return stats;
}

AttentionSpans& Engine::spans() const { return impl_->spans; }
const LoadedModel& Engine::model() const { return *impl_->loaded; }
const EngineOptions& Engine::options() const { return impl_->options; }
CacheShape Engine::cache_shape() const { return impl_->cache->shape(); }

absl::Status Engine::CheckIntegrity() {
  absl::Status status;
  absl::Notification done;
  {
    absl::MutexLock lock(&impl_->mu);
    if (impl_->stop) return absl::UnavailableError("the engine has stopped");
    impl_->integrity.emplace_back(&status, &done);
  }
  done.WaitForNotification();
  return status;
}

}  // namespace longspan
