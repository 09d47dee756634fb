#include "server/tls.h"

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

constexpr unsigned kRefreshSeconds = 5;

// gRPC itself says no more than "handshake failed" about a file that it cannot use.
absl::StatusOr<std::string> ReadPem(absl::string_view flag, const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) {
    return absl::InvalidArgumentError(
        absl::StrCat("--", flag, ": ", path, ": ", std::strerror(errno)));
  }
  std::string text(std::istreambuf_iterator<char>(in), {});
  if (!absl::StrContains(text, "-----BEGIN ")) {
    return absl::InvalidArgumentError(absl::StrCat("--", flag, ": ", path, " is not a PEM file"));
  }
  return text;
}

// A pair that does not belong together would make every handshake fail.
absl::Status CheckPair(const ServerTls& tls, const std::string& cert_pem,
                       const std::string& key_pem) {
  using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
  using Cert = std::unique_ptr<X509, decltype(&X509_free)>;
  using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
  const auto Memory = [](const std::string& text) {
    return Bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), BIO_free);
  };
  static char no_password[] = "";  // instead of asking on the terminal
  const Cert cert(PEM_read_bio_X509(Memory(cert_pem).get(), nullptr, nullptr, no_password),
                  X509_free);
  const Key key(PEM_read_bio_PrivateKey(Memory(key_pem).get(), nullptr, nullptr, no_password),
                EVP_PKEY_free);
  if (cert == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ssl-certfile: ", tls.certfile, " has no certificate that can be read"));
  }
  if (key == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--ssl-keyfile: ", tls.keyfile, " has no private key that can be read without a password"));
  }
  if (X509_check_private_key(cert.get(), key.get()) == 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--ssl-keyfile: ", tls.keyfile, " is not the key of ", tls.certfile));
}

absl::Status BothOrNone(const std::string& certfile, const std::string& keyfile) {
  if (certfile.empty() == keyfile.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(certfile.empty()
                                                     ? "--ssl-keyfile needs --ssl-certfile"
                                                     : "--ssl-certfile needs --ssl-keyfile"));
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> CredentialsOf(const ServerTls& tls) {
  using namespace grpc::experimental;
  if (absl::Status s = BothOrNone(tls.certfile, tls.keyfile); !s.ok()) return s;
  if (tls.cert_reqs > 0 && tls.ca_certs.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--ssl-cert-reqs is ", tls.cert_reqs, ", which needs --ssl-ca-certs"));
  }
  if (tls.certfile.empty()) {
    if (tls.ca_certs.empty()) return grpc::InsecureServerCredentials();
    return absl::InvalidArgumentError("--ssl-ca-certs needs --ssl-certfile and --ssl-keyfile");
  }
  const auto cert = ReadPem("ssl-certfile", tls.certfile);
  if (!cert.ok()) return cert.status();
  const auto key = ReadPem("ssl-keyfile", tls.keyfile);
  if (!key.ok()) return key.status();
  if (absl::Status s = CheckPair(tls, *cert, *key); !s.ok()) return s;
  if (!tls.ca_certs.empty()) {
    if (auto ca = ReadPem("ssl-ca-certs", tls.ca_certs); !ca.ok()) return ca.status();
  }
  TlsServerCredentialsOptions options(std::make_shared<FileWatcherCertificateProvider>(
      tls.keyfile, tls.certfile, tls.ca_certs, kRefreshSeconds));
  options.watch_identity_key_cert_pairs();
  if (!tls.ca_certs.empty()) options.watch_root_certs();
  options.set_cert_request_type(
      tls.cert_reqs == 2   ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
      : tls.cert_reqs == 1 ? GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_AND_VERIFY
                           : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  return TlsServerCredentials(options);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> CredentialsOf(const ClientTls& tls) {
  if (absl::Status s = BothOrNone(tls.certfile, tls.keyfile); !s.ok()) return s;
  if (!tls.on && tls.ca_certs.empty() && tls.certfile.empty()) {
    return grpc::InsecureChannelCredentials();
  }
  grpc::SslCredentialsOptions options;
  for (const auto& [flag, path, text] :
       {std::tuple("ssl-ca-certs", &tls.ca_certs, &options.pem_root_certs),
        {"ssl-certfile", &tls.certfile, &options.pem_cert_chain},
        {"ssl-keyfile", &tls.keyfile, &options.pem_private_key}}) {
    if (path->empty()) continue;
    auto pem = ReadPem(flag, *path);
    if (!pem.ok()) return pem.status();
    *text = *std::move(pem);
  }
  return grpc::SslCredentials(options);
}

}  // namespace longspan
