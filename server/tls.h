#pragma once
// The certificate files of a server and of its clients. Names as in vLLM (--ssl-certfile, ...).
#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace longspan {

struct ServerTls {
  std::string certfile, keyfile;  // PEM; both empty: plaintext
  std::string ca_certs;           // who signs clients' certificates
  int cert_reqs = 0;              // a client's certificate: 0 not asked for, 1 optional, 2 required
};

// Credentials that look at the files again every few seconds, so that a renewed certificate is
// taken by the connections that come after. InvalidArgument names the flag and the file.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> CredentialsOf(const ServerTls& tls);

struct ClientTls {
  bool on = false;                // or any file given
  std::string ca_certs;           // who signs the server's; empty: whom the system trusts
  std::string certfile, keyfile;  // for servers that ask for one
};
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> CredentialsOf(const ClientTls& tls);

}  // namespace longspan
