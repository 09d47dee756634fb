#pragma once
// Events of one request gathered into API messages: whole for unary calls, piece by piece for
// streams. Used on the engine thread; no gRPC in here.
#include <deque>
#include <string>
#include <vector>

#include "engine/request.h"
#include "longspan/v1/inference.pb.h"
#include "server/frontend.h"

namespace longspan {

// Builds one CompleteResponse.
class CompletionBuilder {
 public:
  CompletionBuilder(const Frontend& frontend, const v1::CompleteRequest& request,
                    const Request& converted);
  void Add(const Event& event, v1::CompleteResponse* response);

 private:
  const Frontend& frontend_;
  v1::OutputOptions options_;
  std::string echo_;
  std::vector<int32_t> prompt_;
};

// Builds StreamCompleteResponses and coalesces: while a message waits, later deltas of the same
// choice are merged into it, so what waits is bounded by the choices and by max_tokens, however
// slow the reader.
class StreamBuilder {
 public:
  StreamBuilder(const Frontend& frontend, const v1::CompleteRequest& request,
                const Request& converted, bool include_usage);
  void Add(const Event& event, std::deque<v1::StreamCompleteResponse>* outbox);

 private:
  const Frontend& frontend_;
  v1::OutputOptions options_;
  std::string id_, echo_;
  std::vector<int32_t> prompt_;
  std::vector<bool> echoed_;
  bool include_usage_;
};

}  // namespace longspan
