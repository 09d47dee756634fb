#include "models/family_keys.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "models/checkpoint_json.h"

namespace longspan {

using nlohmann::json;

const json* ConfigKeys::Find(const char* key) const {
  for (const json* object : {object_, fallback_}) {
    if (object == nullptr) continue;
    const auto it = object->find(key);
    if (it != object->end() && !it->is_null()) return &*it;
  }
  return nullptr;
}

int ConfigKeys::Int(const char* key, int64_t low, int64_t high, std::optional<int64_t> otherwise) {
  const json* value = Find(key);
  if (value == nullptr) {
    if (!otherwise) Fail(absl::StrCat(key, " is missing"));
    return static_cast<int>(otherwise.value_or(low));
  }
  // An unsigned value beyond int64 would wrap: compare it as what it is.
  const bool fits = value->is_number_integer() &&
                    (!value->is_number_unsigned() || value->get<uint64_t>() <= INT64_MAX);
  if (!fits || value->get<int64_t>() < low || value->get<int64_t>() > high) {
    Fail(absl::StrCat(key, " is ", Quoted(value->dump()), ", it must be a whole number from ", low,
                      " to ", high));
    return static_cast<int>(low);
  }
  return static_cast<int>(value->get<int64_t>());
}

double ConfigKeys::Number(const char* key, double low, double high,
                          std::optional<double> otherwise) {
  const json* value = Find(key);
  if (value == nullptr) {
    if (!otherwise) Fail(absl::StrCat(key, " is missing"));
    return otherwise.value_or(low);
  }
  if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() < low ||
      value->get<double>() > high) {
    Fail(absl::StrCat(key, " is ", Quoted(value->dump()), ", it must be a number from ", low,
                      " to ", high));
    return low;
  }
  return value->get<double>();
}

bool ConfigKeys::Bool(const char* key, bool otherwise) {
  const json* value = Find(key);
  if (value == nullptr) return otherwise;
  if (value->is_boolean()) return value->get<bool>();
  Fail(absl::StrCat(key, " is ", Quoted(value->dump()), ", it must be true or false"));
  return otherwise;
}

std::string ConfigKeys::String(const char* key, const std::string& otherwise) {
  const json* value = Find(key);
  if (value == nullptr) return otherwise;
  if (value->is_string()) return value->get<std::string>();
  Fail(absl::StrCat(key, " is ", Quoted(value->dump()), ", it must be a string"));
  return otherwise;
}

void ConfigKeys::Fail(absl::string_view text) {
  status_.Update(absl::InvalidArgumentError(absl::StrCat(where_, ": ", text)));
}

}  // namespace longspan
