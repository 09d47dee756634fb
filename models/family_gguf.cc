// GGUF metadata to ModelSpec.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "models/checkpoint_json.h"
#include "models/family.h"
#include "models/family_table.h"

namespace longspan {
namespace {

constexpr uint64_t kMaxSize = 1 << 20;
constexpr uint64_t kMaxTokens = 1 << 30;
constexpr int kGemmaWindowPeriod = 6;  // five window layers, then a full one
constexpr double kGemmaLocalTheta = 10000;
constexpr int kGemma27BLayers = 62;  // the one size whose query scale is not its head size

// Bounded reading with a sticky first failure. Keys that start with "." belong to the architecture.
class Keys {
 public:
  Keys(const GgufMetadata& metadata, std::string architecture)
      : metadata_(metadata), architecture_(std::move(architecture)) {}

  const absl::Status& status() const { return status_; }
  void Fail(absl::string_view text) { status_.Update(absl::InvalidArgumentError(text)); }

  std::string FullName(absl::string_view key) const {
    return key.front() == '.' ? absl::StrCat(architecture_, key) : std::string(key);
  }

  const GgufValue* Find(absl::string_view key) const {
    const auto it = metadata_.find(FullName(key));
    return it == metadata_.end() ? nullptr : &it->second;
  }

  int Int(absl::string_view key, uint64_t low, uint64_t high,
          std::optional<uint64_t> otherwise = {}) {
    const GgufValue* value = Find(key);
    if (value == nullptr) return static_cast<int>(Missing(key, otherwise).value_or(low));
    return Bounded(key, *value, low, high);
  }

  double Number(absl::string_view key, double low, double high,
                std::optional<double> otherwise = {}) {
    const GgufValue* value = Find(key);
    if (value == nullptr) return Missing(key, otherwise).value_or(low);
    const double* number = std::get_if<double>(value);
    if (number == nullptr) {
      Fail(absl::StrCat(FullName(key), " is not a floating-point number"));
      return low;
    }
    if (!std::isfinite(*number) || *number < low || *number > high) {
      Fail(absl::StrCat(FullName(key), " is ", *number, ", it must be from ", low, " to ", high));
      return low;
    }
    return *number;
  }

  // A number, or an array with one for each layer.
  std::vector<int> PerLayer(absl::string_view key, size_t layers, uint64_t low, uint64_t high,
                            std::optional<uint64_t> otherwise) {
    const GgufValue* value = Find(key);
    std::vector<int> out;
    const auto* list = value == nullptr ? nullptr : std::get_if<std::vector<uint64_t>>(value);
    const auto* signed_list = value == nullptr ? nullptr : std::get_if<std::vector<int64_t>>(value);
    if (list == nullptr && signed_list == nullptr) {
      out.assign(layers, Int(key, low, high, otherwise));
      return out;
    }
    const size_t size = list != nullptr ? list->size() : signed_list->size();
    if (size != layers) {
      Fail(absl::StrCat(FullName(key), " has ", size, " values, the model ", layers, " layers"));
      return std::vector<int>(layers, static_cast<int>(low));
    }
    for (size_t i = 0; i < size; ++i) {
      out.push_back(list != nullptr ? Bounded(key, (*list)[i], low, high)
                                    : Bounded(key, (*signed_list)[i], low, high));
    }
    return out;
  }

  std::string String(absl::string_view key, const std::string& otherwise) {
    const GgufValue* value = Find(key);
    if (value == nullptr) return otherwise;
    if (const auto* text = std::get_if<std::string>(value)) return *text;
    Fail(absl::StrCat(FullName(key), " is not a string"));
    return otherwise;
  }

 private:
  template <class T>
  std::optional<T> Missing(absl::string_view key, std::optional<T> otherwise) {
    if (!otherwise) Fail(absl::StrCat(FullName(key), " is missing"));
    return otherwise;
  }

  int Bounded(absl::string_view key, const GgufValue& value, uint64_t low, uint64_t high) {
    uint64_t number = 0;
    if (const auto* plain = std::get_if<uint64_t>(&value)) {
      number = *plain;
    } else if (const auto* with_sign = std::get_if<int64_t>(&value)) {
      if (*with_sign < 0) {
        Fail(absl::StrCat(FullName(key), " is ", *with_sign, ", it must be from ", low, " to ",
                          high));
        return static_cast<int>(low);
      }
      number = static_cast<uint64_t>(*with_sign);
    } else {
      Fail(absl::StrCat(FullName(key), " is not a whole number"));
      return static_cast<int>(low);
    }
    if (number < low || number > high) {
      Fail(absl::StrCat(FullName(key), " is ", number, ", it must be from ", low, " to ", high));
      return static_cast<int>(low);
    }
    return static_cast<int>(number);
  }

  const GgufMetadata& metadata_;
  std::string architecture_;
  absl::Status status_;
};

int VocabOf(Keys& keys) {
  const GgufValue* tokens = keys.Find("tokenizer.ggml.tokens");
  if (tokens == nullptr) return keys.Int(".vocab_size", 1, 1 << 24);
  const auto* list = std::get_if<std::vector<std::string>>(tokens);
  if (list == nullptr) {
    keys.Fail("tokenizer.ggml.tokens is not an array of strings");
    return 1;
  }
  return static_cast<int>(list->size());
}

// Which layers are full: each n-th, or as an array of bools (true: window) says.
std::vector<bool> WindowLayers(size_t layers, Keys& keys) {
  constexpr absl::string_view kKey = ".attention.sliding_window_pattern";
  const GgufValue* value = keys.Find(kKey);
  if (value != nullptr) {
    if (const auto* list = std::get_if<std::vector<bool>>(value)) {
      if (list->size() != layers) {
        keys.Fail(absl::StrCat(keys.FullName(kKey), " has ", list->size(), " values, the model ",
                               layers, " layers"));
        return std::vector<bool>(layers);
      }
      return *list;
    }
  }
  const int period = keys.Int(kKey, 1, 1024, kGemmaWindowPeriod);
  std::vector<bool> window(layers, true);
  for (size_t i = period - 1; i < layers; i += period) window[i] = false;
  return window;
}

RopeSpec GlobalRope(int head_dim, ModelSpec* spec, Keys& keys) {
  RopeSpec rope;
  rope.theta = keys.Number(".rope.freq_base", 1e-3, 1e15, 1e6);
  rope.rotary_dim = head_dim;
  const std::string scaling = keys.String(".rope.scaling.type", "none");
  if (scaling == "linear") {
    rope.scaling = RopeSpec::Scaling::kLinear;
    rope.factor = keys.Number(".rope.scaling.factor", 1e-3, 1e6);
  } else if (scaling == "yarn") {
    rope.scaling = RopeSpec::Scaling::kYarn;
    rope.factor = keys.Number(".rope.scaling.factor", 1e-3, 1e6);
  } else if (scaling != "none") {
    spec->also_needs.push_back(absl::StrCat("rope scaling ", Quoted(scaling)));
  }
  return rope;
}

void ReadGemma3Layers(ModelSpec* spec, Keys& keys) {
  const auto layers = static_cast<size_t>(keys.Int(".block_count", 1, 1024));
  const std::vector<int> heads = keys.PerLayer(".attention.head_count", layers, 1, kMaxSize, {});
  const std::vector<int> kv_heads =
      keys.PerLayer(".attention.head_count_kv", layers, 1, kMaxSize, heads[0]);
  const int head_dim = keys.Int(".attention.key_length", 1, kMaxSize, 256);
  const int value_dim = keys.Int(".attention.value_length", 1, kMaxSize, head_dim);
  if (value_dim != head_dim) {
    spec->also_needs.push_back("head size of values unlike that of keys");
  }
  const int window = keys.Int(".attention.sliding_window", 1, kMaxTokens);
  const double scale_dim = layers == kGemma27BLayers ? spec->dim / heads[0] : head_dim;
  const double softcap = keys.Number(".attn_logit_softcapping", 0, 1e9, 0);
  const RopeSpec global = GlobalRope(head_dim, spec, keys);
  const RopeSpec local = {.theta = keys.Number(".rope.freq_base_swa", 1e-3, 1e15, kGemmaLocalTheta),
                          .rotary_dim = head_dim};
  const std::vector<bool> slides = WindowLayers(layers, keys);
  const int intermediate = keys.Int(".feed_forward_length", 1, kMaxSize);
  if (!keys.status().ok()) return;
  for (size_t i = 0; i < layers; ++i) {
    AttentionSpec a;
    a.heads = heads[i];
    a.kv_heads = kv_heads[i];
    a.head_dim = head_dim;
    if (slides[i]) a.window = window;
    a.rope = slides[i] ? local : global;
    a.scale = static_cast<float>(
        keys.Number(".attention.scale", 1e-6, 1e6, 1 / std::sqrt(std::max(scale_dim, 1.0))));
    a.softcap = static_cast<float>(softcap);
    a.qk_norm = true;
    LayerSpec layer;
    layer.mixer = a;
    layer.mlp = MlpSpec{.intermediate = intermediate, .activation = Activation::kGeluTanh};
    layer.post_norms = true;
    spec->layers.push_back(layer);
  }
}

void ReadGemma3(ModelSpec* spec, Keys& keys) {
  spec->family = "gemma3";
  spec->name = "gemma3";
  spec->vocab = VocabOf(keys);
  spec->dim = keys.Int(".embedding_length", 1, kMaxSize);
  spec->max_context = keys.Int(".context_length", 1, kMaxTokens);
  spec->norm_eps =
      static_cast<float>(keys.Number(".attention.layer_norm_rms_epsilon", 1e-12, 1, 1e-6));
  spec->embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(spec->dim)));
  spec->logit_softcap = static_cast<float>(keys.Number(".final_logit_softcapping", 0, 1e9, 0));
  spec->tied_embeddings = true;
  ReadGemma3Layers(spec, keys);
}

void ReadTokens(ModelSpec* spec, Keys& keys) {
  const auto limit = static_cast<uint64_t>(spec->vocab) - 1;
  if (keys.Find("tokenizer.ggml.bos_token_id") != nullptr) {
    spec->bos_token = keys.Int("tokenizer.ggml.bos_token_id", 0, limit);
  }
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    if (keys.Find(key) == nullptr) continue;
    const int token = keys.Int(key, 0, limit);
    if (std::find(spec->eos_tokens.begin(), spec->eos_tokens.end(), token) ==
        spec->eos_tokens.end()) {
      spec->eos_tokens.push_back(token);
    }
  }
}

absl::Status NotReadable(const std::string& architecture) {
  std::string text = absl::StrCat("general.architecture is ", Quoted(architecture),
                                  "; what is read from GGUF: gemma3");
  const FamilyTraits* family = FindFamily(absl::StrReplaceAll(architecture, {{"-", "_"}}));
  const std::vector<std::string> needs =
      family == nullptr ? std::vector<std::string>() : NeedsOf(*family);
  if (!needs.empty()) {
    absl::StrAppend(&text,
                    "; besides, it needs what is not supported: ", absl::StrJoin(needs, ", "));
  }
  return absl::InvalidArgumentError(text);
}

}  // namespace

absl::StatusOr<ModelSpec> SpecFromGguf(const GgufMetadata& metadata) {
  const auto it = metadata.find("general.architecture");
  const auto* architecture = it == metadata.end() ? nullptr : std::get_if<std::string>(&it->second);
  if (architecture == nullptr) {
    return absl::InvalidArgumentError("general.architecture is missing or not a string");
  }
  if (*architecture != "gemma3") return NotReadable(*architecture);
  ModelSpec spec;
  Keys keys(metadata, *architecture);
  if (keys.Int("split.count", 0, 65535, 0) > 1) {
    keys.Fail("split.count is more than 1: a model split over several GGUF files is not read");
  }
  ReadGemma3(&spec, keys);
  if (keys.status().ok()) ReadTokens(&spec, keys);
  if (!keys.status().ok()) return keys.status();
  absl::Status status = spec.Validate();
  if (!status.ok()) return status;
  return spec;
}

}  // namespace longspan
