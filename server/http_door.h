#pragma once
// The HTTP door: /metrics and its like, /health, /version. Read-only; a fixed number of threads; no
// files are served; long pages are gzipped for those who take that.
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace longspan {

class HttpDoor {
 public:
  struct Page {
    int status = 200;
    std::string content_type = "text/plain; charset=utf-8";
    std::string body;
  };
  struct Route {
    std::string path;  // exact
    bool open;         // to those without a key
    std::function<Page()> page;
  };
  // Given the value of Authorization, "" if there is none.
  using Authenticate = std::function<absl::Status(absl::string_view authorization)>;

  // address: "HOST:PORT"; port 0 picks a free one. Unavailable if it cannot be bound.
  static absl::StatusOr<std::unique_ptr<HttpDoor>> Open(const std::string& address,
                                                        std::vector<Route> routes,
                                                        Authenticate authenticate);
  ~HttpDoor();
  int port() const;

 private:
  struct Impl;
  explicit HttpDoor(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace longspan
