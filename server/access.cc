#include "server/access.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "engine/request.h"
#include "server/log.h"
#include "server/status.h"

namespace longspan {

// A bucket that holds a minute's tokens and fills at that rate. A request is let in while there is
// something in it and may take it below nothing, since nobody knows beforehand how long an answer
// gets; the next one waits until the debt is paid.
class Account {
 public:
  Account(ApiKey key, Access::Clock now)
      : now_(std::move(now)), key_(std::move(key)), tokens_(Rate()), filled_(now_()) {}

  ApiKey key() const {
    absl::MutexLock lock(&mu_);
    return key_;
  }
  // New limits hold from now on.
  void Update(ApiKey key) {
    absl::MutexLock lock(&mu_);
    Fill();
    const bool first = key_.tokens_per_minute == 0;
    key_ = std::move(key);
    tokens_ = first ? Rate() : std::min(tokens_, Rate());
  }

  absl::Status Begin(const std::string& request_id, int64_t prompt_tokens) {
    absl::MutexLock lock(&mu_);
    if (key_.max_requests > 0 && static_cast<int64_t>(running_.size()) >= key_.max_requests) {
      return WithReason(absl::ResourceExhaustedError(
                            absl::StrCat("key '", key_.name, "' has ", running_.size(),
                                         " requests in flight, the limit is ", key_.max_requests)),
                        "KEY_LIMIT");
    }
    Fill();
    if (key_.tokens_per_minute > 0 && tokens_ <= 0) {
      const absl::Duration wait = absl::Minutes((1 - tokens_) / Rate());
      return WithRetry(
          WithReason(absl::ResourceExhaustedError(absl::StrCat(
                         "key '", key_.name, "' has used its ", key_.tokens_per_minute,
                         " tokens a minute; the next request is taken in ",
                         absl::FormatDuration(absl::Ceil(wait, absl::Milliseconds(1))))),
                     "KEY_LIMIT"),
          wait);
    }
    running_.insert(request_id);
    tokens_ -= static_cast<double>(prompt_tokens);
    return absl::OkStatus();
  }
  void Charge(int64_t tokens) {
    absl::MutexLock lock(&mu_);
    Fill();
    tokens_ -= static_cast<double>(tokens);
  }
  void End(const std::string& request_id) {
    absl::MutexLock lock(&mu_);
    running_.erase(running_.find(request_id));
  }
  bool MayAbort(const std::string& request_id) const {
    absl::MutexLock lock(&mu_);
    return key_.admin || running_.contains(request_id);
  }

 private:
  double Rate() const ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return static_cast<double>(key_.tokens_per_minute);
  }
  void Fill() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    const absl::Time now = now_();
    tokens_ = std::min(Rate(), tokens_ + Rate() * absl::ToDoubleMinutes(now - filled_));
    filled_ = now;
  }

  const Access::Clock now_;
  mutable absl::Mutex mu_;
  ApiKey key_ ABSL_GUARDED_BY(mu_);
  double tokens_ ABSL_GUARDED_BY(mu_);
  absl::Time filled_ ABSL_GUARDED_BY(mu_);
  std::multiset<std::string> running_ ABSL_GUARDED_BY(mu_);  // ids: two may claim one for a moment
};

Lease::Lease(std::shared_ptr<Account> account, std::string request_id)
    : account_(std::move(account)), request_id_(std::move(request_id)) {}
Lease& Lease::operator=(Lease&& other) {
  std::swap(account_, other.account_);
  std::swap(request_id_, other.request_id_);
  return *this;
}
Lease::~Lease() {
  if (account_ != nullptr) account_->End(request_id_);
}
void Lease::Charge(int64_t tokens) const {
  if (account_ != nullptr) account_->Charge(tokens);
}

std::string Caller::name() const { return account_ == nullptr ? "" : account_->key().name; }

absl::StatusOr<Lease> Caller::Begin(const std::string& request_id, int64_t prompt_tokens) const {
  if (account_ == nullptr) return Lease();
  if (absl::Status s = account_->Begin(request_id, prompt_tokens); !s.ok()) return s;
  return Lease(account_, request_id);
}

bool Caller::MayAbort(const std::string& request_id) const {
  return account_ == nullptr || account_->MayAbort(request_id);
}

bool Caller::MaySee(const Caller& owner) const {
  return account_ == nullptr || account_ == owner.account_ || account_->key().admin;
}

absl::StatusOr<std::unique_ptr<Access>> Access::Open(std::string path, Clock now) {
  std::unique_ptr<Access> access(new Access(std::move(path), std::move(now)));
  if (!access->path_.empty()) {
    absl::MutexLock lock(&access->mu_);
    if (absl::Status loaded = access->Load(); !loaded.ok()) return loaded;
  }
  return access;
}

absl::StatusOr<Caller> Access::Authenticate(absl::string_view authorization, Role role) {
  if (path_.empty()) return Caller();
  std::shared_ptr<Account> caller;
  {
    absl::MutexLock lock(&mu_);
    LoadIfChanged();
    if (authorization.empty()) {
      return absl::UnauthenticatedError("no API key: send 'authorization: Bearer KEY'");
    }
    const size_t scheme = std::min<size_t>(authorization.size(), 7);
    if (!absl::EqualsIgnoreCase(authorization.substr(0, scheme), "Bearer ")) {
      return absl::UnauthenticatedError("authorization is not 'Bearer KEY'");
    }
    // All of them, so that the time does not tell which was nearest.
    for (const auto& [secret, account] : accounts_) {
      if (SameSecret(secret, authorization.substr(scheme))) caller = account;
    }
  }
  if (caller == nullptr) return absl::UnauthenticatedError("the API key is not known");
  if (role == Role::kAdmin && !caller->key().admin) {
    return absl::PermissionDeniedError(
        absl::StrCat("key '", caller->key().name, "' is not an admin's"));
  }
  return Caller(std::move(caller));
}

absl::StatusOr<Access::Stamp> Access::StampOf(const std::string& path) {
  struct stat s;
  if (stat(path.c_str(), &s) != 0) {
    return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  return Stamp{s.st_mtim.tv_sec, s.st_mtim.tv_nsec, s.st_size, s.st_ino};
}

absl::Status Access::Load() {
  looked_ = now_();
  auto stamp = StampOf(path_);
  if (!stamp.ok()) return stamp.status();
  stamp_ = *stamp;
  std::ifstream in(path_, std::ios::binary);
  const std::string text(std::istreambuf_iterator<char>(in), {});
  if (!in) return absl::NotFoundError(absl::StrCat(path_, ": cannot be read"));
  auto keys = ParseApiKeys(text, path_);
  if (!keys.ok()) return keys.status();
  std::map<std::string, std::shared_ptr<Account>> accounts;
  for (ApiKey& key : *keys) {
    std::shared_ptr<Account>& account = accounts[key.secret];
    if (const auto known = accounts_.find(key.secret); known != accounts_.end()) {
      account = known->second;
      account->Update(std::move(key));
    } else {
      account = std::make_shared<Account>(std::move(key), now_);
    }
  }
  accounts_ = std::move(accounts);
  Log(LogLevel::kInfo, "API keys read", {{"file", path_}, {"keys", accounts_.size()}});
  return absl::OkStatus();
}

void Access::LoadIfChanged() {
  if (now_() - looked_ < absl::Seconds(1)) return;
  looked_ = now_();
  const auto stamp = StampOf(path_);
  if (stamp.ok() ? *stamp == stamp_ : stamp_ == Stamp()) return;
  stamp_ = stamp.value_or(Stamp());
  if (const absl::Status loaded = stamp.ok() ? Load() : stamp.status(); !loaded.ok()) {
    Log(LogLevel::kError, "API keys kept as they were", {{"why", loaded.message()}});
  }
}

}  // namespace longspan
