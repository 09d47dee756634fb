#include "models/checkpoint_json.h"

#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

using nlohmann::json;

// Builds the tree; stops at the first thing that breaks a rule.
class TreeBuilder : public nlohmann::json_sax<json> {
 public:
  TreeBuilder(absl::string_view file, JsonLimits limits) : file_(file), limits_(limits) {}

  json root;
  absl::Status status;

  bool null() override { return Add(nullptr); }
  bool boolean(bool value) override { return Add(value); }
  bool number_integer(number_integer_t value) override { return Add(value); }
  bool number_unsigned(number_unsigned_t value) override { return Add(value); }
  bool number_float(number_float_t value, const string_t&) override { return Add(value); }
  bool string(string_t& value) override { return Add(std::move(value)); }
  bool binary(binary_t&) override { return Fail("binary value"); }
  bool start_object(size_t) override { return Open(json::object()); }
  bool start_array(size_t) override { return Open(json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool key(string_t& name) override {
    json& object = *open_.back();
    if (object.contains(name)) return Fail(absl::StrCat("key ", Quoted(name), " appears twice"));
    slot_ = &object[name];
    return true;
  }

  bool parse_error(size_t position, const std::string&, const json::exception&) override {
    return Fail(absl::StrCat("not valid JSON at byte ", position));
  }

 private:
  bool Fail(absl::string_view text) {
    status = absl::InvalidArgumentError(absl::StrCat(file_, ": ", text));
    return false;
  }

  json* Place(json value) {
    if (open_.empty()) {
      root = std::move(value);
      return &root;
    }
    json& parent = *open_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    *slot_ = std::move(value);
    return slot_;
  }

  bool Add(json value) {
    if (++values_ > limits_.values) {
      return Fail(absl::StrCat("more than ", limits_.values, " JSON values"));
    }
    Place(std::move(value));
    return true;
  }

  bool Open(json value) {
    if (static_cast<int>(open_.size()) >= limits_.depth) {
      return Fail(absl::StrCat("JSON nested deeper than ", limits_.depth));
    }
    if (++values_ > limits_.values) {
      return Fail(absl::StrCat("more than ", limits_.values, " JSON values"));
    }
    open_.push_back(Place(std::move(value)));
    return true;
  }

  bool Close() {
    open_.pop_back();
    return true;
  }

  absl::string_view file_;
  JsonLimits limits_;
  std::vector<json*> open_;  // stays valid: a container's elements do not move while one is open
  json* slot_ = nullptr;     // where the value of the last key goes
  int64_t values_ = 0;
};

}  // namespace

absl::StatusOr<json> ParseJsonObject(absl::string_view text, absl::string_view file,
                                     JsonLimits limits) {
  TreeBuilder builder(file, limits);
  if (!json::sax_parse(text.begin(), text.end(), &builder)) return builder.status;
  if (!builder.root.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": the text is JSON ", builder.root.type_name(), ", not an object"));
  }
  return std::move(builder.root);
}

std::string Quoted(absl::string_view text) {
  constexpr size_t kMost = 80;
  return absl::StrCat("\"", absl::Utf8SafeCHexEscape(text.substr(0, kMost)),
                      text.size() > kMost ? "…\"" : "\"");
}

}  // namespace longspan
