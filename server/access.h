#pragma once
// Who may call, and how much: the API keys of a file that is read again when it changes, with what
// each has in flight and has used. All methods are safe from any thread.
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "server/api_keys.h"

namespace longspan {

enum class Role { kUser, kAdmin };

// What one key has in flight and has used. Outlives the key's line in the file.
class Account;

// One accepted request of a caller; its end gives its place back.
class Lease {
 public:
  Lease() = default;
  Lease(std::shared_ptr<Account> account, std::string request_id);
  Lease(Lease&&) = default;
  Lease& operator=(Lease&& other);
  ~Lease();
  void Charge(int64_t tokens) const;

 private:
  std::shared_ptr<Account> account_;
  std::string request_id_;
};

// Who a call comes from. Without keys: anybody, who may do all.
class Caller {
 public:
  Caller() = default;
  explicit Caller(std::shared_ptr<Account> account) : account_(std::move(account)) {}
  std::string name() const;
  // Takes a place and charges the prompt. ResourceExhausted with both numbers, and the reason
  // KEY_LIMIT, where the key has as many requests as it may or has used its tokens; for the latter
  // with kRetryAfterMs.
  absl::StatusOr<Lease> Begin(const std::string& request_id, int64_t prompt_tokens) const;
  // An admin's, and the key's own requests.
  bool MayAbort(const std::string& request_id) const;
  // The same for what another call of `owner` has made.
  bool MaySee(const Caller& owner) const;

 private:
  std::shared_ptr<Account> account_;
};

class Access {
 public:
  using Clock = std::function<absl::Time()>;
  // path "": no keys are asked for. Else NotFound or InvalidArgument where the file is not good.
  static absl::StatusOr<std::unique_ptr<Access>> Open(std::string path, Clock now = absl::Now);

  // authorization: "Bearer SECRET". Unauthenticated if it is not a key's; PermissionDenied if the
  // key has not that role. Looks at most once a second whether the file has changed; one that has
  // become bad is told in the log, and the last good keys stay.
  absl::StatusOr<Caller> Authenticate(absl::string_view authorization, Role role);

 private:
  struct Stamp {
    int64_t seconds = 0, nanoseconds = 0, size = 0;
    uint64_t inode = 0;
    bool operator==(const Stamp&) const = default;
  };
  Access(std::string path, Clock now) : path_(std::move(path)), now_(std::move(now)) {}
  static absl::StatusOr<Stamp> StampOf(const std::string& path);
  absl::Status Load() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void LoadIfChanged() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const std::string path_;
  const Clock now_;
  absl::Mutex mu_;
  absl::Time looked_ ABSL_GUARDED_BY(mu_);
  Stamp stamp_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, std::shared_ptr<Account>> accounts_ ABSL_GUARDED_BY(mu_);  // by secret
};

}  // namespace longspan
