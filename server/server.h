#pragma once
// The whole server as one object: model, engine, gRPC services, HTTP door. Used by `serve` and by
// tests.
#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "server/config.h"

namespace longspan {

class Server {
 public:
  // Loads the model, binds the addresses, serves. request_shutdown is called (from any thread) when
  // an administrator asks for the end; it must not block.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerConfig& config,
                                                       std::function<void()> request_shutdown);
  ~Server();  // aborts what is left

  int grpc_port() const;
  int http_port() const;  // 0: none
  Engine& engine();
  void LogReady(absl::Duration after) const;  // one line: model, device, addresses

  // The order of SIGTERM: not ready at once; after the withdrawal grace refuse; wait for accepted
  // requests up to the shutdown timeout; abort the rest with UNAVAILABLE. Returns how many were
  // aborted.
  int DrainAndStop();

 private:
  struct Impl;
  explicit Server(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longspan
