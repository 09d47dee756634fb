#include "server/inference_service.h"

#include <grpc/grpc.h>

#include <atomic>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/answer.h"
#include "server/completion.h"
#include "server/log.h"
#include "server/status.h"
#include "server/trace_parent.h"

namespace longspan {
namespace {

absl::Time DeadlineOf(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  // gRPC says "none" with a time far beyond any real one.
  if (deadline > std::chrono::system_clock::now() + std::chrono::hours(24 * 365)) {
    return absl::InfiniteFuture();
  }
  return absl::FromChrono(deadline);
}

// The line about one request: who asked, how it ended, what it took.
class RequestLog {
 public:
  RequestLog(const grpc::CallbackServerContext& context, const char* method)
      : method_(method), traceparent_(TraceParentOf(context)) {}
  void SetKey(std::string name) { key_ = std::move(name); }
  void Count(const Event& finished) {
    prompt_tokens_ = finished.prompt_tokens;
    completion_tokens_ = finished.completion_tokens;
  }
  // INTERNAL is our fault and worth a line at every level.
  void End(const std::string& id, const absl::Status& status) const {
    Log(absl::IsInternal(status) ? LogLevel::kError : LogLevel::kInfo, "request ended",
        {{"method", method_},
         {"request_id", id},
         {"key", key_},
         {"traceparent", traceparent_},
         {"code", absl::StatusCodeToString(status.code())},
         {"message", status.message()},
         {"prompt_tokens", prompt_tokens_},
         {"completion_tokens", completion_tokens_},
         {"seconds", LogValue::Seconds(absl::ToDoubleSeconds(absl::Now() - begin_))}});
  }

 private:
  const char* method_;
  std::string traceparent_, key_;
  absl::Time begin_ = absl::Now();
  int prompt_tokens_ = 0, completion_tokens_ = 0;
};

// The prompt's beginning, where --log-prompt-bytes asks for it.
void LogPrompt(const Frontend& frontend, const Request& request) {
  const size_t most = frontend.log_prompt_bytes;
  if (most == 0) return;
  const auto tokens = absl::MakeConstSpan(request.prompt).subspan(0, most);
  const std::string text = frontend.conversion.tokenizer->Decode(tokens, /*skip_special=*/true);
  Log(LogLevel::kInfo, "prompt",
      {{"request_id", request.id},
       {"tokens", request.prompt.size()},
       {"text", absl::string_view(text).substr(0, most)}});
}

// What the client calls its request, which a refusal's line is found by.
std::string AskedId(const v1::CompleteRequest& base) {
  constexpr size_t kMostLogged = 256;
  return base.request_id().substr(0, kMostLogged);
}

// Which message holds what, for a completion and for a chat.
const v1::CompleteRequest& Base(const v1::CompleteRequest& r) { return r; }
const v1::CompleteRequest& Base(const v1::ChatRequest& r) { return r.base(); }
const v1::CompleteRequest& Inner(const v1::StreamCompleteRequest& r) { return r.request(); }
const v1::ChatRequest& Inner(const v1::StreamChatRequest& r) { return r.request(); }
v1::CompleteResponse* Base(v1::CompleteResponse* r) { return r; }
v1::CompleteResponse* Base(v1::ChatResponse* r) { return r->mutable_base(); }
void Wrap(v1::StreamCompleteResponse from, v1::StreamCompleteResponse* to) {
  *to = std::move(from);
}
void Wrap(v1::StreamCompleteResponse from, v1::StreamChatResponse* to) {
  *to->mutable_base() = std::move(from);
  to->set_role("assistant");
}
void Complete(v1::CompleteResponse*) {}
void Complete(v1::ChatResponse* response) {
  for (const v1::Choice& choice : response->base().choices()) {
    v1::ChatMessage* message = response->add_messages();
    message->set_role("assistant");
    message->set_content(choice.text());
  }
}

// A call that begins on gRPC's thread, or on the prompt worker if its message is long. OnDone may
// come before the worker has returned; whichever is last deletes the call.
class Beginning {
 public:
  virtual ~Beginning() = default;

 protected:
  void Begin(const Frontend& frontend, size_t bytes, std::function<void()> start) {
    ++holds_;
    frontend.prompt_worker.Run(bytes, [this, start = std::move(start)] {
      start();
      Release();
    });
  }
  void Release() {
    if (--holds_ == 0) delete this;
  }
  // Set by OnCancel, which on the worker can come before there is anything to cancel.
  std::atomic<bool> cancelled_{false};

 private:
  std::atomic<int> holds_{1};
};

// One unary call. Lives until both OnDone and the request's last event have come.
template <class RequestMessage, class ResponseMessage>
class UnaryCall : public grpc::ServerUnaryReactor, private Beginning {
 public:
  UnaryCall(const Frontend& frontend, const char* method, grpc::CallbackServerContext* context,
            const RequestMessage& message, ResponseMessage* response)
      : frontend_(frontend), log_(*context, method), context_(context), response_(response) {
    auto caller = frontend.Authenticate(*context, Role::kUser);
    if (!caller.ok()) {
      End(caller.status());
      return;
    }
    log_.SetKey(caller->name());
    Begin(frontend, message.ByteSizeLong(),
          [this, message = &message, caller = *std::move(caller)] { Start(*message, caller); });
  }

 private:
  void Start(const RequestMessage& message, const Caller& caller) {
    id_ = AskedId(Base(message));
    if (cancelled_) return End(absl::CancelledError("cancelled by the client"));
    auto request = ToRequest(message, frontend_.conversion);
    if (!request.ok()) {
      End(request.status());
      return;
    }
    id_ = request->id;
    auto lease = caller.Begin(request->id, static_cast<int64_t>(request->prompt.size()));
    if (!lease.ok()) {
      End(lease.status());
      return;
    }
    lease_ = *std::move(lease);
    request->deadline = DeadlineOf(*context_);
    context_->AddInitialMetadata("x-request-id", id_);
    LogPrompt(frontend_, *request);
    Base(response_)->set_request_id(id_);
    Base(response_)->set_model(frontend_.conversion.model_names.front());
    Base(response_)->set_created_unix_seconds(absl::ToUnixSeconds(absl::Now()));
    builder_ = std::make_unique<CompletionBuilder>(frontend_, Base(message), *request);
    submitted_ = true;
    const absl::Status status =
        frontend_.Submit(*std::move(request), [this](Event event) { OnEvent(std::move(event)); });
    if (!status.ok()) {
      submitted_ = false;
      End(status);
    } else if (cancelled_) {
      CancelRequest();
    }
  }
  void OnEvent(Event event) {
    builder_->Add(event, Base(response_));
    if (event.kind == Event::Kind::kFinished) {
      Complete(response_);
      log_.Count(event);
      lease_.Charge(event.completion_tokens);
      ended_.store(true);
      End(event.status);
    }
  }
  void End(const absl::Status& status) {
    log_.End(id_, status);
    frontend_.metrics.CountRefusal(status);
    lease_ = Lease();  // before the client knows, whose next call may follow at once
    Finish(ToGrpc(status, context_));
  }
  void OnCancel() override {
    cancelled_ = true;
    CancelRequest();
  }
  void CancelRequest() {
    if (submitted_ && !ended_.load()) frontend_.engine.Cancel(id_);
  }
  void OnDone() override { Release(); }

  const Frontend& frontend_;
  RequestLog log_;
  grpc::CallbackServerContext* context_;
  ResponseMessage* response_;
  std::string id_;
  Lease lease_;
  std::unique_ptr<CompletionBuilder> builder_;
  std::atomic<bool> submitted_{false};
  std::atomic<bool> ended_{false};
};

// One stream. At most one write is outstanding; what comes meanwhile waits, coalesced, in the
// outbox.
template <class RequestMessage, class ResponseMessage>
class StreamCall : public grpc::ServerWriteReactor<ResponseMessage>, private Beginning {
 public:
  StreamCall(const Frontend& frontend, const char* method, grpc::CallbackServerContext* context,
             const RequestMessage& message)
      : frontend_(frontend), log_(*context, method), context_(context) {
    auto caller = frontend.Authenticate(*context, Role::kUser);
    if (!caller.ok()) {
      Refuse(caller.status());
      return;
    }
    log_.SetKey(caller->name());
    Begin(frontend, message.ByteSizeLong(),
          [this, message = &message, caller = *std::move(caller)] { Start(*message, caller); });
  }

 private:
  void Start(const RequestMessage& message, const Caller& caller) {
    id_ = AskedId(Base(Inner(message)));
    if (cancelled_) return Refuse(absl::CancelledError("cancelled by the client"));
    auto request = ToRequest(Inner(message), frontend_.conversion);
    if (!request.ok()) {
      Refuse(request.status());
      return;
    }
    id_ = request->id;
    auto lease = caller.Begin(request->id, static_cast<int64_t>(request->prompt.size()));
    if (!lease.ok()) {
      Refuse(lease.status());
      return;
    }
    lease_ = *std::move(lease);
    request->deadline = DeadlineOf(*context_);
    context_->AddInitialMetadata("x-request-id", id_);
    LogPrompt(frontend_, *request);
    builder_ = std::make_unique<StreamBuilder>(frontend_, Base(Inner(message)), *request,
                                               message.include_usage());
    stream_ = frontend_.watchdog.Add([this] { OnStall(); });
    submitted_ = true;
    const absl::Status status =
        frontend_.Submit(*std::move(request), [this](Event event) { OnEvent(std::move(event)); });
    if (!status.ok()) {
      submitted_ = false;
      Refuse(status);
    } else if (cancelled_) {
      Abandon();
    }
  }

  // What is to be done once the lock is released: the last of these may delete the call.
  enum class Action { kNone, kWrite, kFinish };

  void Refuse(const absl::Status& status) {
    Action action;
    {
      absl::MutexLock lock(&mu_);
      ended_ = true;
      status_ = status;
      action = Next();
    }
    Do(action);
  }

  void OnEvent(Event event) {
    Action action;
    {
      absl::MutexLock lock(&mu_);
      builder_->Add(event, &outbox_);
      if (event.kind == Event::Kind::kFinished) {
        ended_ = true;
        log_.Count(event);
        lease_.Charge(event.completion_tokens);
        status_ = event.status;
        if (!status_.ok()) outbox_.clear();
      }
      action = Next();
    }
    Do(action);
  }

  void OnWriteDone(bool ok) override {
    frontend_.watchdog.WriteEnded(stream_);
    Action action;
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      if (!ok) broken_ = true;
      action = Next();
    }
    Do(action);
  }

  // The next write or, when all is written and the request has ended, the end; each exactly once.
  Action Next() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (writing_ || finished_) return Action::kNone;
    if (!outbox_.empty() && !broken_) {
      Wrap(std::move(outbox_.front()), &current_);
      outbox_.pop_front();
      writing_ = true;
      return Action::kWrite;
    }
    if (!ended_) return Action::kNone;
    finished_ = true;
    return Action::kFinish;
  }

  // Not under the lock: from StartWrite and Finish on, gRPC may call back and delete this.
  void Do(Action action) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    switch (action) {
      case Action::kNone:
        return;
      case Action::kWrite:
        frontend_.watchdog.WriteBegan(stream_);
        this->StartWrite(&current_);
        return;
      case Action::kFinish: {
        const absl::Status status = stalled_.load() ? Stalled() : status_;
        log_.End(id_, status);
        frontend_.metrics.CountRefusal(status);
        lease_ = Lease();  // before the client knows, whose next call may follow at once
        this->Finish(ToGrpc(status, context_));
        return;
      }
    }
  }

  absl::Status Stalled() const {
    return absl::ResourceExhaustedError(
        absl::StrCat("the reader took nothing for ",
                     absl::FormatDuration(frontend_.watchdog.timeout()), " (--stall-timeout)"));
  }
  // The write will not complete by itself, and Finish would wait behind it: the transport is told
  // to end the call at once, with the status that TryCancel could not give it.
  void OnStall() {
    stalled_.store(true);
    Abandon();
    grpc_call_cancel_with_status(context_->c_call(), GRPC_STATUS_RESOURCE_EXHAUSTED,
                                 std::string(Stalled().message()).c_str(), nullptr);
  }
  void OnCancel() override {
    cancelled_ = true;
    Abandon();
  }
  // Not once the request has ended: its id may be another's by then.
  void Abandon() {
    {
      absl::MutexLock lock(&mu_);
      if (ended_) return;
    }
    if (submitted_) frontend_.engine.Cancel(id_);
  }
  void OnDone() override {
    if (stream_ != 0) frontend_.watchdog.Remove(stream_);
    Release();
  }

  const Frontend& frontend_;
  RequestLog log_;
  grpc::CallbackServerContext* context_;
  std::string id_;
  Lease lease_;
  std::unique_ptr<StreamBuilder> builder_;
  uint64_t stream_ = 0;
  std::atomic<bool> submitted_{false};
  std::atomic<bool> stalled_{false};
  absl::Mutex mu_;
  std::deque<v1::StreamCompleteResponse> outbox_ ABSL_GUARDED_BY(mu_);
  ResponseMessage current_;  // belongs to the outstanding write
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool broken_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
};

class InferenceServiceImpl final : public v1::InferenceService::CallbackService {
 public:
  explicit InferenceServiceImpl(const Frontend& frontend) : f_(frontend) {}

  grpc::ServerUnaryReactor* Complete(grpc::CallbackServerContext* context,
                                     const v1::CompleteRequest* request,
                                     v1::CompleteResponse* response) override {
    return new UnaryCall<v1::CompleteRequest, v1::CompleteResponse>(f_, "Complete", context,
                                                                    *request, response);
  }
  grpc::ServerUnaryReactor* Chat(grpc::CallbackServerContext* context,
                                 const v1::ChatRequest* request,
                                 v1::ChatResponse* response) override {
    return new UnaryCall<v1::ChatRequest, v1::ChatResponse>(f_, "Chat", context, *request,
                                                            response);
  }
  grpc::ServerWriteReactor<v1::StreamCompleteResponse>* StreamComplete(
      grpc::CallbackServerContext* context, const v1::StreamCompleteRequest* request) override {
    return new StreamCall<v1::StreamCompleteRequest, v1::StreamCompleteResponse>(
        f_, "StreamComplete", context, *request);
  }
  grpc::ServerWriteReactor<v1::StreamChatResponse>* StreamChat(
      grpc::CallbackServerContext* context, const v1::StreamChatRequest* request) override {
    return new StreamCall<v1::StreamChatRequest, v1::StreamChatResponse>(f_, "StreamChat", context,
                                                                         *request);
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    const auto body = [this, request, response](const Caller&) -> absl::Status {
      if (absl::Status s = CheckModel(request->model(), f_.conversion); !s.ok()) return s;
      std::vector<int32_t> ids;
      switch (request->input_case()) {
        case v1::TokenizeRequest::kText: {
          if (request->text().size() > f_.conversion.max_prompt_bytes) {
            return absl::InvalidArgumentError(absl::StrCat("text: has ", request->text().size(),
                                                           " bytes, the limit is ",
                                                           f_.conversion.max_prompt_bytes));
          }
          Tokenizer::EncodeOptions options;
          if (request->has_add_special_tokens()) options.add_bos = request->add_special_tokens();
          ids = f_.conversion.tokenizer->Encode(request->text(), options);
          break;
        }
        case v1::TokenizeRequest::kChat: {
          auto rendered = RenderChat(request->chat(), f_.conversion);
          if (!rendered.ok()) return rendered.status();
          ids = *std::move(rendered);
          break;
        }
        case v1::TokenizeRequest::INPUT_NOT_SET:
          return absl::InvalidArgumentError("input: neither text nor chat is set");
      }
      response->mutable_token_ids()->Add(ids.begin(), ids.end());
      if (request->return_pieces()) {
        for (int32_t id : ids) response->add_pieces(f_.conversion.tokenizer->Piece(id));
      }
      response->set_max_model_len(f_.conversion.max_context);
      return absl::OkStatus();
    };
    return Logged(context, "Tokenize", body, request->ByteSizeLong());
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return Logged(context, "Detokenize", [&](const Caller&) -> absl::Status {
      if (absl::Status s = CheckModel(request->model(), f_.conversion); !s.ok()) return s;
      // An id is a few bytes and its text may be many.
      if (request->token_ids_size() > f_.conversion.max_context) {
        return absl::InvalidArgumentError(absl::StrCat("token_ids: has ", request->token_ids_size(),
                                                       " ids, the limit is ",
                                                       f_.conversion.max_context));
      }
      const Tokenizer& tokenizer = *f_.conversion.tokenizer;
      std::vector<int32_t> ids;
      for (uint32_t id : request->token_ids()) {
        if (id >= static_cast<uint32_t>(tokenizer.vocab_size())) {
          return absl::InvalidArgumentError(absl::StrCat(
              "token_ids: token id ", id, " is not in the vocabulary of ", tokenizer.vocab_size()));
        }
        ids.push_back(static_cast<int32_t>(id));
      }
      response->set_text(tokenizer.Decode(ids, request->skip_special_tokens()));
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context,
                                  const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override {
    return Logged(context, "Abort", [&](const Caller& caller) {
      for (const std::string& id : request->request_ids()) {
        if (caller.MayAbort(id) && f_.engine.Cancel(id)) response->add_aborted_request_ids(id);
      }
      return absl::OkStatus();
    });
  }

 private:
  template <class Body>
  grpc::ServerUnaryReactor* Logged(grpc::CallbackServerContext* context, const char* method,
                                   const Body& body, size_t bytes = 0) {
    return Answer(
        f_, context, Role::kUser,
        [body, log = RequestLog(*context, method)](const Caller& caller) {
          RequestLog named = log;
          named.SetKey(caller.name());
          const absl::Status status = body(caller);
          named.End("", status);
          return status;
        },
        bytes);
  }

  const Frontend& f_;
};

}  // namespace

std::unique_ptr<grpc::Service> MakeInferenceService(const Frontend& frontend) {
  return std::make_unique<InferenceServiceImpl>(frontend);
}

}  // namespace longspan
