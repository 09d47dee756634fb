#include "server/http_door.h"

#include <civetweb.h>
#include <dlfcn.h>
#include <pthread.h>
#include <zlib.h>

#include <algorithm>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"

// libcivetweb asks for 100 KiB for each of its threads, of which glibc takes what the libraries of
// the process keep per thread: cuBLASLt alone 92 KiB. No thread starts with what is left, and
// nothing of libcivetweb's says otherwise, so that its call comes here before it goes to glibc.
extern "C" int pthread_attr_setstacksize(pthread_attr_t* attributes, size_t bytes) noexcept {
  constexpr size_t kLeastBytes = 1 << 20;
  using Set = int (*)(pthread_attr_t*, size_t);
  static const auto set = reinterpret_cast<Set>(dlsym(RTLD_NEXT, "pthread_attr_setstacksize"));
  return set(attributes, std::max(bytes, kLeastBytes));
}

namespace longspan {
namespace {

constexpr size_t kWorthPacking = 4096;

// Level 1: a metrics page shrinks to a tenth, and a scraper asks for it every few seconds.
std::string Gzip(const std::string& text) {
  z_stream stream = {};
  CHECK_EQ(deflateInit2(&stream, /*level=*/1, Z_DEFLATED, /*window and gzip=*/15 + 16,
                        /*memory=*/8, Z_DEFAULT_STRATEGY),
           Z_OK);
  std::string packed(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  CHECK_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  return packed;
}

}  // namespace

struct HttpDoor::Impl {
  std::vector<Route> routes;
  Authenticate authenticate;
  mg_context* context = nullptr;
  int port = 0;

  // CivetWeb answers what it cannot parse by itself and never looks for files: no document_root is
  // set.
  static bool TakesGzip(mg_connection* connection) {
    const char* accepted = mg_get_header(connection, "Accept-Encoding");
    return accepted != nullptr && absl::StrContains(accepted, "gzip");
  }

  static int Handle(mg_connection* connection, void* data) {
    const auto& self = *static_cast<Impl*>(data);
    const mg_request_info* info = mg_get_request_info(connection);
    const char* authorization = mg_get_header(connection, "Authorization");
    Page page = self.Answer(info->request_method, info->local_uri,
                            authorization == nullptr ? "" : authorization);
    const bool packed = page.body.size() >= kWorthPacking && TakesGzip(connection);
    if (packed) page.body = Gzip(page.body);
    const bool head = std::strcmp(info->request_method, "HEAD") == 0;
    const std::string header = absl::StrCat(
        "HTTP/1.1 ", page.status, " ", mg_get_response_code_text(connection, page.status),
        "\r\nContent-Type: ", page.content_type, "\r\nContent-Length: ", page.body.size(),
        packed ? "\r\nContent-Encoding: gzip" : "", "\r\nVary: Accept-Encoding",
        page.status == 405 ? "\r\nAllow: GET, HEAD" : "",
        page.status == 401 ? "\r\nWWW-Authenticate: Bearer" : "",
        "\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n");
    mg_write(connection, header.data(), header.size());
    if (!head) mg_write(connection, page.body.data(), page.body.size());
    return page.status;
  }

  Page Answer(absl::string_view method, absl::string_view path,
              absl::string_view authorization) const {
    for (const Route& route : routes) {
      if (route.path != path) continue;
      if (method != "GET" && method != "HEAD")
        return {405, "text/plain; charset=utf-8", "GET only\n"};
      if (!route.open) {
        if (absl::Status s = authenticate(authorization); !s.ok()) {
          return {401, "text/plain; charset=utf-8", absl::StrCat(s.message(), "\n")};
        }
      }
      return route.page();
    }
    return {404, "text/plain; charset=utf-8", "no such page\n"};
  }
};

absl::StatusOr<std::unique_ptr<HttpDoor>> HttpDoor::Open(const std::string& address,
                                                         std::vector<Route> routes,
                                                         Authenticate authenticate) {
  auto impl = std::make_unique<Impl>();
  impl->routes = std::move(routes);
  impl->authenticate = std::move(authenticate);
  // Scrapers and probes only: eight at once are plenty, and a slow one holds a thread for 5 s at
  // most.
  const char* options[] = {"listening_ports",
                           address.c_str(),
                           "num_threads",
                           "8",
                           "request_timeout_ms",
                           "5000",
                           "max_request_size",
                           "16384",
                           "enable_directory_listing",
                           "no",
                           nullptr};
  mg_callbacks callbacks = {};
  callbacks.log_message = [](const mg_connection*, const char*) { return 1; };
  impl->context = mg_start(&callbacks, nullptr, options);
  if (impl->context == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen for HTTP on ", address));
  }
  mg_set_request_handler(impl->context, "/", Impl::Handle, impl.get());
  mg_server_port ports[4] = {};
  if (mg_get_server_ports(impl->context, 4, ports) > 0) impl->port = ports[0].port;
  return std::unique_ptr<HttpDoor>(new HttpDoor(std::move(impl)));
}

HttpDoor::HttpDoor(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpDoor::~HttpDoor() { mg_stop(impl_->context); }
int HttpDoor::port() const { return impl_->port; }

}  // namespace longspan
