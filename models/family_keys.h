#pragma once
// Bounded reading of one configuration object: every getter names the key, the value and the limit,
// and the first failure sticks, so that a mapping reads as a list of fields. A null value counts as
// absent.
#include <cstdint>
#include <optional>
#include <string>

#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace longspan {

class ConfigKeys {
 public:
  // `where` starts every message. Keys absent from `object` are looked up in `fallback` (may be
  // null).
  ConfigKeys(const nlohmann::json& object, const nlohmann::json* fallback, std::string where)
      : object_(&object), fallback_(fallback), where_(std::move(where)) {}

  const nlohmann::json* Find(const char* key) const;  // nullptr when absent or null
  bool Has(const char* key) const { return Find(key) != nullptr; }

  // Without `otherwise` the key is required.
  int Int(const char* key, int64_t low, int64_t high, std::optional<int64_t> otherwise = {});
  double Number(const char* key, double low, double high, std::optional<double> otherwise = {});
  bool Bool(const char* key, bool otherwise);
  std::string String(const char* key, const std::string& otherwise);

  void Fail(absl::string_view text);
  void Merge(const absl::Status& status) { status_.Update(status); }
  const absl::Status& status() const { return status_; }
  const std::string& where() const { return where_; }

 private:
  const nlohmann::json* object_;
  const nlohmann::json* fallback_;
  std::string where_;
  absl::Status status_;
};

}  // namespace longspan
