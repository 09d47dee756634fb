// The table that `longspan describe` prints.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "models/spec.h"

namespace longspan {
namespace {

std::string Grouped(int64_t n) {
  std::string digits = absl::StrCat(n);
  for (int i = static_cast<int>(digits.size()) - 3; i > 0; i -= 3) {
    digits.insert(digits.begin() + i, ',');
  }
  return digits;
}

std::string HumanBytes(int64_t bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? absl::StrCat(bytes, " B") : absl::StrFormat("%.1f %s", value, kUnits[unit]);
}

std::string MixerText(const AttentionSpec& a) {
  std::string text =
      a.window ? absl::StrCat(a.chunked ? "chunks of " : "window ", *a.window) : "full";
  absl::StrAppend(&text, ", ", a.heads, "/", a.kv_heads, " heads of ", a.head_dim);
  if (a.qk_norm) absl::StrAppend(&text, ", QK-norm");
  if (a.softcap != 0) absl::StrAppend(&text, ", softcap ", a.softcap);
  if (a.sinks) absl::StrAppend(&text, ", sinks");
  if (a.gate != AttentionSpec::Gate::kNone) absl::StrAppend(&text, ", gate");
  return text;
}

std::string MixerText(const RecurrentSpec& r) { return r.kind; }

std::string PositionText(const AttentionSpec& a) {
  if (!a.rope) return "none";
  std::string text = absl::StrFormat("rope %.10g", a.rope->theta);
  switch (a.rope->scaling) {
    case RopeSpec::Scaling::kNone:
      break;
    case RopeSpec::Scaling::kLinear:
      absl::StrAppendFormat(&text, ", /%g", a.rope->factor);
      break;
    case RopeSpec::Scaling::kYarn:
      absl::StrAppendFormat(&text, ", yarn %g", a.rope->factor);
      break;
    case RopeSpec::Scaling::kLlama3:
      absl::StrAppendFormat(&text, ", llama3 %g", a.rope->factor);
      break;
    case RopeSpec::Scaling::kDynamic:
      absl::StrAppendFormat(&text, ", dynamic %g", a.rope->factor);
      break;
  }
  if (a.rope->rotary_dim != a.head_dim) absl::StrAppend(&text, ", ", a.rope->rotary_dim, " dims");
  if (a.rope->interleaved) absl::StrAppend(&text, ", interleaved");
  return text;
}

std::string PositionText(const RecurrentSpec&) { return "in the state"; }

struct Row {
  std::string layer, mixer, position, cache, bytes;
};

Row RowOf(const LayerSpec& layer, int index, DType cache_dtype) {
  Row row;
  row.layer = absl::StrCat(index);
  row.mixer = std::visit([](const auto& m) { return MixerText(m); }, layer.mixer);
  row.position = std::visit([](const auto& m) { return PositionText(m); }, layer.mixer);
  if (layer.cache_of) {
    row.cache = absl::StrCat("of layer ", *layer.cache_of);
    row.bytes = absl::StrCat(0);
    return row;
  }
  const CacheNeed need = NeedOf(layer.mixer, cache_dtype);
  switch (need.kind) {
    case CacheKind::kPaged:
      row.cache = "pages";
      row.bytes = absl::StrCat(Grouped(need.bytes_per_token), " per token");
      break;
    case CacheKind::kRing:
      row.cache = "ring";
      row.bytes = absl::StrCat(Grouped(need.bytes_per_token), " per token, at most ",
                               Grouped(need.bytes_per_token * need.window), " per sequence");
      break;
    case CacheKind::kState:
      row.cache = "state";
      row.bytes = absl::StrCat(Grouped(need.bytes_per_sequence), " per sequence");
      break;
  }
  return row;
}

// Columns padded to their widest cell. All cells are ASCII.
std::string Table(const std::vector<Row>& rows) {
  const auto cells = [](const Row& row) {
    return std::vector<absl::string_view>{row.layer, row.mixer, row.position, row.cache, row.bytes};
  };
  std::vector<size_t> widths(5, 0);
  for (const Row& row : rows) {
    const auto texts = cells(row);
    for (size_t i = 0; i < texts.size(); ++i) widths[i] = std::max(widths[i], texts[i].size());
  }
  std::string out;
  for (const Row& row : rows) {
    const auto texts = cells(row);
    for (size_t i = 0; i + 1 < texts.size(); ++i) {
      const std::string padding(widths[i] - texts[i].size(), ' ');
      if (i == 0) absl::StrAppend(&out, padding, texts[i], " | ");
      if (i > 0) absl::StrAppend(&out, texts[i], padding, " | ");
    }
    absl::StrAppend(&out, texts.back(), "\n");
  }
  return out;
}

// Layers whose caches need the same, as one term of the closed form.
struct Term {
  CacheNeed need;
  int layers = 0;
};

bool SameNeed(const CacheNeed& a, const CacheNeed& b) {
  return a.kind == b.kind && a.bytes_per_token == b.bytes_per_token && a.window == b.window &&
         a.bytes_per_sequence == b.bytes_per_sequence;
}

std::vector<Term> TermsOf(const ModelSpec& spec, DType cache_dtype) {
  std::vector<Term> terms;
  for (const LayerSpec& layer : spec.layers) {
    if (layer.cache_of) continue;
    const CacheNeed need = NeedOf(layer.mixer, cache_dtype);
    auto it = std::find_if(terms.begin(), terms.end(),
                           [&](const Term& term) { return SameNeed(term.need, need); });
    if (it == terms.end()) it = terms.insert(terms.end(), Term{need});
    ++it->layers;
  }
  std::stable_sort(terms.begin(), terms.end(),
                   [](const Term& a, const Term& b) { return a.need.kind < b.need.kind; });
  return terms;
}

int64_t BytesFor(const CacheNeed& need, int64_t context) {
  const int64_t tokens =
      need.kind == CacheKind::kRing ? std::min<int64_t>(context, need.window) : context;
  return need.bytes_per_sequence + need.bytes_per_token * tokens;
}

std::string TermText(const Term& term, int64_t context) {
  switch (term.need.kind) {
    case CacheKind::kPaged:
      return absl::StrCat(term.layers, " x ", Grouped(context), " x ",
                          Grouped(term.need.bytes_per_token));
    case CacheKind::kRing:
      return absl::StrCat(term.layers, " x min(", Grouped(context), ", ", Grouped(term.need.window),
                          ") x ", Grouped(term.need.bytes_per_token));
    case CacheKind::kState:
      return absl::StrCat(term.layers, " x ", Grouped(term.need.bytes_per_sequence));
  }
  return "";
}

int64_t CacheBytes(const ModelSpec& spec, DType cache_dtype, int64_t context) {
  int64_t total = 0;
  for (const Term& term : TermsOf(spec, cache_dtype)) {
    total += term.layers * BytesFor(term.need, context);
  }
  return total;
}

nlohmann::ordered_json JsonOf(const LayerSpec& layer, int index, DType cache_dtype) {
  static constexpr const char* kCaches[] = {"pages", "ring", "state"};
  nlohmann::ordered_json json = {
      {"layer", index},
      {"mixer", std::visit([](const auto& m) { return MixerText(m); }, layer.mixer)},
      {"position", std::visit([](const auto& m) { return PositionText(m); }, layer.mixer)}};
  if (layer.cache_of) {
    json["cache_of_layer"] = *layer.cache_of;
    return json;
  }
  const CacheNeed need = NeedOf(layer.mixer, cache_dtype);
  json["cache"] = kCaches[static_cast<int>(need.kind)];
  json["cache_bytes_per_token"] = need.bytes_per_token;
  json["cache_bytes_per_sequence"] = need.bytes_per_sequence;
  if (need.kind == CacheKind::kRing) json["window"] = need.window;
  return json;
}

// bytes(L) = sum of full layers L * b + sum of window layers min(L, W) * b + states.
std::string CacheTotals(const ModelSpec& spec, DType cache_dtype, int64_t context) {
  const int64_t total = CacheBytes(spec, cache_dtype, context);
  int64_t all_full = 0;
  std::vector<std::string> texts;
  for (const Term& term : TermsOf(spec, cache_dtype)) {
    all_full += term.layers * (term.need.bytes_per_sequence + term.need.bytes_per_token * context);
    texts.push_back(TermText(term, context));
  }
  std::string out = absl::StrCat("cache of a sequence of ", Grouped(context), " tokens (",
                                 Info(cache_dtype).name, "): ", absl::StrJoin(texts, " + "), " = ",
                                 Grouped(total), " bytes (", HumanBytes(total), ")");
  if (all_full > total) {
    absl::StrAppend(&out, "; were every layer full: ", Grouped(all_full), " bytes (",
                    HumanBytes(all_full), ")");
  }
  return out + "\n";
}

}  // namespace

std::string Describe(const ModelSpec& spec, const OpTable& ops, DType cache_dtype,
                     int64_t context) {
  std::string out = absl::StrCat(
      spec.name, ": ", spec.family, ", ", Grouped(spec.parameters()), " parameters (",
      Info(spec.weight_dtype).name, "), ", spec.layers.size(), " layers, width ", Grouped(spec.dim),
      ", vocabulary ", Grouped(spec.vocab), ", context ", Grouped(spec.max_context), "\n\n");
  std::vector<Row> rows = {{"layer", "mixer", "position", "cache", "bytes"}};
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    rows.push_back(RowOf(spec.layers[i], static_cast<int>(i), cache_dtype));
  }
  absl::StrAppend(&out, Table(rows), "\n", CacheTotals(spec, cache_dtype, context));
  const std::vector<std::string> missing = MissingFor(spec, ops);
  absl::StrAppend(&out, "missing: ", missing.empty() ? "nothing" : absl::StrJoin(missing, ", "),
                  "\n");
  return out;
}

std::string DescribeJson(const ModelSpec& spec, const OpTable& ops, DType cache_dtype,
                         int64_t context) {
  nlohmann::ordered_json json = {{"name", spec.name},
                                 {"family", spec.family},
                                 {"parameters", spec.parameters()},
                                 {"weight_dtype", Info(spec.weight_dtype).name},
                                 {"width", spec.dim},
                                 {"vocabulary", spec.vocab},
                                 {"max_context", spec.max_context},
                                 {"layers", nlohmann::ordered_json::array()},
                                 {"cache_dtype", Info(cache_dtype).name},
                                 {"context", context},
                                 {"cache_bytes", CacheBytes(spec, cache_dtype, context)},
                                 {"missing", MissingFor(spec, ops)}};
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    json["layers"].push_back(JsonOf(spec.layers[i], static_cast<int>(i), cache_dtype));
  }
  // A name in a model file may be any bytes.
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace longspan
