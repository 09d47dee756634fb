#pragma once
// The HTTP door: /metrics, /metrics/attention, /health, /version. Read-only; a fixed number of
// threads; no files are served.
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace longspan {

class HttpDoor {
 public:
  struct Page {
    int status = 200;
    std::string content_type = "text/plain; charset=utf-8";
    std::string body;
  };
  using Route = std::pair<std::string, std::function<Page()>>;  // exact path → page

  // address: "HOST:PORT"; port 0 picks a free one. Unavailable if it cannot be bound.
  static absl::StatusOr<std::unique_ptr<HttpDoor>> Open(const std::string& address,
                                                        std::vector<Route> routes);
  ~HttpDoor();
  int port() const;

 private:
  struct Impl;
  explicit HttpDoor(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longspan
