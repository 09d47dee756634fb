#include "server/serve.h"

#include <grpc/support/log.h>
#include <poll.h>
#include <signal.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <iostream>
#include <thread>

#include "absl/time/clock.h"
#include "server/log.h"
#include "server/server.h"

namespace longspan {
namespace {

// SIGTERM and SIGINT as readable bytes: blocked in every thread, read here.
class Signals {
 public:
  Signals() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    fd_ = signalfd(-1, &set, SFD_CLOEXEC);
    signal(SIGPIPE, SIG_IGN);
  }
  ~Signals() { close(fd_); }
  // Waits for the next one.
  std::string Next() const {
    signalfd_siginfo info = {};
    while (read(fd_, &info, sizeof info) != static_cast<ssize_t>(sizeof info)) {
    }
    return info.ssi_signo == SIGINT ? "SIGINT" : "SIGTERM";
  }

 private:
  int fd_;
};

// What gRPC itself has to say, as lines of ours.
void LogOfGrpc(gpr_log_func_args* line) {
  const LogLevel level = line->severity == GPR_LOG_SEVERITY_ERROR  ? LogLevel::kError
                         : line->severity == GPR_LOG_SEVERITY_INFO ? LogLevel::kInfo
                                                                   : LogLevel::kDebug;
  Log(level, "grpc", {{"message", line->message}});
}

}  // namespace

int RunServe(int argc, char** argv) {
  ServerConfig config;
  if (auto exit = ReadConfig(argc, argv, &config); exit.has_value()) return *exit;
  SetLogLevel(config.log_level);
  SetLogFormat(config.log_format);
  gpr_set_log_function(LogOfGrpc);
  const Signals signals;  // before any thread, so that all inherit the mask
  const absl::Time begin = absl::Now();
  auto server = Server::Start(config, [] { kill(getpid(), SIGTERM); });
  if (!server.ok()) {
    if (config.log_format == "json") {
      Log(LogLevel::kError, "cannot serve", {{"message", server.status().message()}});
    } else {
      std::cerr << "longspan serve: " << server.status().message() << "\n";
    }
    return absl::IsInvalidArgument(server.status()) ? 2 : 1;
  }
  (*server)->LogReady(absl::Now() - begin);

  Log(LogLevel::kInfo, "draining; a second signal quits at once", {{"signal", signals.Next()}});
  std::thread([&signals] {
    signals.Next();
    Log(LogLevel::kWarning, "second signal: quitting");
    _exit(130);
  }).detach();
  const int aborted = (*server)->DrainAndStop();
  const absl::Status health = (*server)->engine().Health();
  server->reset();
  Log(LogLevel::kInfo, "stopped", {{"aborted_requests", aborted}});
  std::cerr.flush();
  // Not return: the detached thread still waits on `signals`.
  _exit(health.ok() ? 0 : 1);
}

}  // namespace longspan
