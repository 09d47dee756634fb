// config.json to ModelSpec.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/checkpoint_json.h"
#include "models/family.h"
#include "models/family_keys.h"
#include "models/family_table.h"

namespace longspan {
namespace {

using nlohmann::json;

constexpr int64_t kMaxConfigBytes = 4 << 20;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxSize =
    1 << 20;  // of dims and heads; ModelSpec::Validate() bounds the products
constexpr int64_t kMaxTokens = 1 << 30;
constexpr int64_t kMaxVocab = 1 << 24;

enum class LayerType : uint8_t { kFull, kSliding, kChunked, kRecurrent };

constexpr std::pair<absl::string_view, LayerType> kLayerTypes[] = {
    {"full_attention", LayerType::kFull},        {"attention", LayerType::kFull},
    {"sliding_attention", LayerType::kSliding},  {"chunked_attention", LayerType::kChunked},
    {"linear_attention", LayerType::kRecurrent}, {"mamba", LayerType::kRecurrent},
    {"mamba2", LayerType::kRecurrent},           {"conv", LayerType::kRecurrent},
    {"recurrent", LayerType::kRecurrent},
};

const char* NameOf(LayerType type) {
  switch (type) {
    case LayerType::kFull:
      return "full_attention";
    case LayerType::kSliding:
      return "sliding_attention";
    case LayerType::kChunked:
      return "chunked_attention";
    case LayerType::kRecurrent:
      return "linear_attention";
  }
  return "?";
}

void Needs(ModelSpec* spec, std::string what) {
  if (std::find(spec->also_needs.begin(), spec->also_needs.end(), what) == spec->also_needs.end()) {
    spec->also_needs.push_back(std::move(what));
  }
}

std::vector<LayerType> ListedLayerTypes(const json& list, int layers, ConfigKeys& keys) {
  std::vector<LayerType> types;
  if (!list.is_array() || static_cast<int>(list.size()) != layers) {
    keys.Fail(absl::StrCat("layer_types has ", list.is_array() ? list.size() : 0,
                           " entries, num_hidden_layers is ", layers));
    return types;
  }
  for (const json& name : list) {
    const auto known =
        std::find_if(std::begin(kLayerTypes), std::end(kLayerTypes), [&](const auto& candidate) {
          return name.is_string() && name.get_ref<const std::string&>() == candidate.first;
        });
    if (known == std::end(kLayerTypes)) {
      keys.Fail(absl::StrCat("layer_types[", types.size(), "] is ", Quoted(name.dump()),
                             ", which is not a known kind of layer"));
      return types;
    }
    types.push_back(known->second);
  }
  return types;
}

// Each `period`-th layer is full, the others are `rest`.
std::vector<LayerType> PeriodicLayerTypes(int layers, int period, LayerType rest) {
  std::vector<LayerType> types(static_cast<size_t>(layers), rest);
  for (int i = period - 1; i < layers; i += period)
    types[static_cast<size_t>(i)] = LayerType::kFull;
  return types;
}

// "LLLG": L slides, G is full, repeated.
std::vector<LayerType> PatternedLayerTypes(const std::string& pattern, int layers,
                                           ConfigKeys& keys) {
  std::vector<LayerType> types;
  if (pattern.empty() || pattern.find_first_not_of("LG") != std::string::npos) {
    keys.Fail(
        absl::StrCat("sliding_window_pattern is ", Quoted(pattern), ", expected letters L and G"));
    return types;
  }
  for (int i = 0; i < layers; ++i) {
    const char letter = pattern[static_cast<size_t>(i) % pattern.size()];
    types.push_back(letter == 'L' ? LayerType::kSliding : LayerType::kFull);
  }
  return types;
}

// layer_types wins; then a pattern; then the family's own; then sliding_window makes all layers
// slide.
std::vector<LayerType> LayerTypesOf(const FamilyTraits& family, int layers, ConfigKeys& keys) {
  for (const char* key : {"layer_types", "layers_block_type"}) {
    if (const json* list = keys.Find(key)) return ListedLayerTypes(*list, layers, keys);
  }
  const LayerType rest = family.recurrent.empty() ? LayerType::kSliding : LayerType::kRecurrent;
  for (const char* key :
       {"sliding_window_pattern", "_sliding_window_pattern", "full_attention_interval"}) {
    const json* pattern = keys.Find(key);
    if (pattern == nullptr) continue;
    if (pattern->is_string()) return PatternedLayerTypes(pattern->get<std::string>(), layers, keys);
    return PeriodicLayerTypes(layers, keys.Int(key, 1, kMaxLayers), rest);
  }
  if (family.full_every > 0) return PeriodicLayerTypes(layers, family.full_every, rest);
  const bool slides = keys.Has("sliding_window") && keys.Bool("use_sliding_window", true);
  return std::vector<LayerType>(static_cast<size_t>(layers),
                                slides ? LayerType::kSliding : LayerType::kFull);
}

// One rope_parameters or rope_scaling object; theta comes from it or from `default_theta`.
RopeSpec ParseRope(const json& object, const std::string& where, int head_dim,
                   double default_partial, std::optional<double> default_theta, ModelSpec* spec,
                   ConfigKeys& keys) {
  static constexpr std::pair<absl::string_view, RopeSpec::Scaling> kScalings[] = {
      {"default", RopeSpec::Scaling::kNone},
      {"linear", RopeSpec::Scaling::kLinear},
      {"yarn", RopeSpec::Scaling::kYarn},
      {"llama3", RopeSpec::Scaling::kLlama3},
      {"dynamic", RopeSpec::Scaling::kDynamic}};
  RopeSpec rope;
  ConfigKeys inner(object, nullptr, absl::StrCat(keys.where(), ": ", where));
  const std::string type = inner.String("rope_type", inner.String("type", "default"));
  const auto known = std::find_if(std::begin(kScalings), std::end(kScalings),
                                  [&](const auto& s) { return s.first == type; });
  if (known != std::end(kScalings)) {
    rope.scaling = known->second;
  } else {
    Needs(spec, absl::StrCat("rope scaling ", Quoted(type)));
  }
  if (inner.Has("mrope_section")) Needs(spec, "multimodal rope");
  rope.theta = inner.Number("rope_theta", 1e-3, 1e15, default_theta);
  if (rope.scaling != RopeSpec::Scaling::kNone) rope.factor = inner.Number("factor", 1e-3, 1e6);
  const double partial = inner.Number("partial_rotary_factor", 1e-6, 1, default_partial);
  rope.rotary_dim = static_cast<int>(head_dim * partial);
  keys.Merge(inner.status());
  return rope;
}

// The rope of one kind of layer; nullopt is NoPE. Newer configs have rope_parameters, either one
// object or one per kind (null: none); older ones rope_theta, rope_scaling and
// rope_local_base_freq.
std::optional<RopeSpec> RopeOf(LayerType type, const FamilyTraits& family, int head_dim,
                               ModelSpec* spec, ConfigKeys& keys) {
  if (family.nope_on_full && type == LayerType::kFull) return std::nullopt;
  const double partial = keys.Number("partial_rotary_factor", 1e-6, 1, 1.0);
  const bool two_bases = family.model_type == "gemma3_text";
  const bool local = type == LayerType::kSliding && (two_bases || keys.Has("rope_local_base_freq"));
  const double local_theta = keys.Number("rope_local_base_freq", 1e-3, 1e15, 10000);
  const double global_theta = keys.Number("rope_theta", 1e-3, 1e15, two_bases ? 1e6 : 10000);
  const json* parameters = keys.Find("rope_parameters");
  if (parameters != nullptr && !parameters->is_object()) {
    keys.Fail("rope_parameters is not an object");
    return std::nullopt;
  }
  if (parameters != nullptr) {
    const bool per_kind = std::any_of(
        std::begin(kLayerTypes), std::end(kLayerTypes),
        [&](const auto& kind) { return parameters->contains(std::string(kind.first)); });
    if (per_kind) {
      const auto it = parameters->find(NameOf(type));
      if (it == parameters->end()) {
        keys.Fail(absl::StrCat("rope_parameters has no ", NameOf(type)));
        return std::nullopt;
      }
      if (it->is_null()) return std::nullopt;
      const std::string where = absl::StrCat("rope_parameters.", NameOf(type));
      if (!it->is_object()) {
        keys.Fail(absl::StrCat(where, " is neither an object nor null"));
        return std::nullopt;
      }
      return ParseRope(*it, where, head_dim, partial, std::nullopt, spec, keys);
    }
    if (!local) {
      return ParseRope(*parameters, "rope_parameters", head_dim, partial, global_theta, spec, keys);
    }
  }
  static const json kPlain = json::object();
  if (local) return ParseRope(kPlain, "rope", head_dim, partial, local_theta, spec, keys);
  const json* scaling = keys.Find("rope_scaling");
  if (scaling != nullptr && !scaling->is_object()) {
    keys.Fail("rope_scaling is not an object");
    return std::nullopt;
  }
  return ParseRope(scaling == nullptr ? kPlain : *scaling, "rope_scaling", head_dim, partial,
                   global_theta, spec, keys);
}

// Llama 4 and SmolLM3 list the layers that have no rope as zeros.
bool LayerLacksRope(int layer, ConfigKeys& keys) {
  const json* list = keys.Find("no_rope_layers");
  if (list == nullptr || !list->is_array() || list->empty()) return false;
  if (layer >= static_cast<int>(list->size())) {
    keys.Fail(
        absl::StrCat("no_rope_layers has ", list->size(), " entries, layer ", layer, " needs one"));
    return false;
  }
  const json& flag = (*list)[static_cast<size_t>(layer)];
  return flag == 0 || flag == false;
}

float AttentionScale(const FamilyTraits& family, int head_dim, ConfigKeys& keys) {
  if (family.gemma) {
    return static_cast<float>(1 / std::sqrt(keys.Number("query_pre_attn_scalar", 1e-6, 1e6, 256)));
  }
  return static_cast<float>(
      keys.Number("attention_multiplier", 1e-6, 1e6, 1 / std::sqrt(static_cast<double>(head_dim))));
}

// What all attention layers of the model share; window and rope follow per kind.
AttentionSpec SharedAttention(const FamilyTraits& family, int dim, ConfigKeys& keys) {
  const bool gemma3 = family.model_type == "gemma3_text";
  AttentionSpec a;
  a.heads = keys.Int("num_attention_heads", 1, kMaxSize,
                     gemma3 ? std::optional<int64_t>(8) : std::nullopt);
  a.kv_heads = keys.Int("num_key_value_heads", 1, kMaxSize, gemma3 ? 4 : a.heads);
  if (!keys.Has("head_dim") && !family.gemma && dim % a.heads != 0) {
    keys.Fail(absl::StrCat("hidden_size ", dim, " is not a multiple of num_attention_heads ",
                           a.heads, ", and head_dim is missing"));
  }
  a.head_dim = keys.Int("head_dim", 1, kMaxSize, family.gemma ? 256 : std::max(1, dim / a.heads));
  a.scale = AttentionScale(family, a.head_dim, keys);
  a.softcap = static_cast<float>(
      keys.Number("attn_logit_softcapping", 0, 1e9, family.model_type == "gemma2" ? 50 : 0));
  a.qk_norm = family.qk_norm;
  a.sinks = family.sinks;
  a.gate = family.gate;
  a.bias = keys.Bool("attention_bias", family.bias) || keys.Bool("qkv_bias", false);
  return a;
}

int WindowOf(LayerType type, const FamilyTraits& family, ConfigKeys& keys) {
  if (type == LayerType::kChunked) return keys.Int("attention_chunk_size", 1, kMaxTokens, 8192);
  return keys.Int("sliding_window", 1, kMaxTokens,
                  family.gemma ? std::optional<int64_t>(4096) : std::nullopt);
}

Activation ActivationOf(const FamilyTraits& family, ModelSpec* spec, ConfigKeys& keys) {
  const std::string name = family.gemma ? keys.String("hidden_activation", "gelu_pytorch_tanh")
                                        : keys.String("hidden_act", "silu");
  if (name == "silu" || name == "swish") return Activation::kSilu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_tanh") return Activation::kGeluTanh;
  Needs(spec, absl::StrCat("activation ", Quoted(name)));
  return Activation::kSilu;
}

MlpSpec MlpOf(const FamilyTraits& family, ModelSpec* spec, ConfigKeys& keys) {
  MlpSpec mlp;
  mlp.activation = ActivationOf(family, spec, keys);
  mlp.intermediate =
      keys.Int("intermediate_size", 1, kMaxSize,
               family.model_type == "gemma3_text" ? std::optional<int64_t>(9216) : std::nullopt);
  for (const char* key :
       {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"}) {
    if (mlp.experts == 0) mlp.experts = keys.Int(key, 0, kMaxSize, 0);
  }
  for (const char* key : {"num_experts_per_tok", "num_experts_per_token", "moe_top_k"}) {
    if (mlp.experts > 0 && mlp.experts_per_token == 0) {
      mlp.experts_per_token = keys.Int(key, 0, mlp.experts, 0);
    }
  }
  if (mlp.experts > 0) {
    mlp.intermediate = keys.Int("moe_intermediate_size", 1, kMaxSize, mlp.intermediate);
  }
  return mlp;
}

// Keys that ask for what no field describes.
void AddOtherNeeds(const FamilyTraits& family, ModelSpec* spec, ConfigKeys& keys) {
  for (const char* need : family.also_needs) Needs(spec, need);
  static constexpr std::pair<const char*, const char*> kFlags[] = {
      {"mlp_bias", "biases on MLP projections"},
      {"use_bidirectional_attention", "bidirectional attention"},
      {"attn_temperature_tuning", "attention temperature tuning"}};
  for (const auto& [key, need] : kFlags) {
    const json* value = keys.Find(key);
    if (value != nullptr && *value != false && *value != 0) Needs(spec, need);
  }
  if (keys.Has("quantization_config")) {
    const json& quantization = *keys.Find("quantization_config");
    const auto method = quantization.find("quant_method");
    const bool named =
        quantization.is_object() && method != quantization.end() && method->is_string();
    Needs(spec, absl::StrCat("quantization ",
                             named ? Quoted(method->get_ref<const std::string&>()) : "unknown"));
  }
  if (keys.Int("num_kv_shared_layers", 0, kMaxLayers, 0) > 0) {
    Needs(spec, "cache of an earlier layer");
  }
  if (keys.Int("hidden_size_per_layer_input", 0, kMaxSize, 0) > 0) {
    Needs(spec, "per-layer embeddings");
  }
}

// Keeps the upper 16 bits of a float, rounded to nearest even.
float RoundToBf16(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000u;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Gemma multiplies embeddings by sqrt(dim) rounded to the type of its weights.
float EmbeddingScale(const FamilyTraits& family, int dim, ConfigKeys& keys) {
  if (!family.gemma) return static_cast<float>(keys.Number("embedding_multiplier", 1e-6, 1e6, 1));
  const auto scale = static_cast<float>(std::sqrt(static_cast<double>(dim)));
  const std::string dtype = keys.String("dtype", keys.String("torch_dtype", "float32"));
  if (dtype == "bfloat16") return RoundToBf16(scale);
  if (dtype == "float16") {
    // 11 significant bits; in range for any dim.
    int exponent = 0;
    const float fraction = std::frexp(scale, &exponent);
    return std::ldexp(std::nearbyint(std::ldexp(fraction, 11)), exponent - 11);
  }
  return scale;
}

float LogitScale(ConfigKeys& keys) {
  if (keys.Has("logits_scaling")) {
    return static_cast<float>(1 / keys.Number("logits_scaling", 1e-6, 1e6));
  }
  return static_cast<float>(keys.Number("logit_scale", 1e-6, 1e6, 1));
}

void ReadTokens(const json* value, const char* key, int vocab, ConfigKeys& keys,
                std::vector<int>* out) {
  if (value == nullptr || value->is_null()) return;
  const json list = value->is_array() ? *value : json::array({*value});
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocab)) {
      keys.Fail(absl::StrCat(key, " is ", Quoted(value->dump()),
                             ", every id must be a whole number below vocab_size ", vocab));
      return;
    }
    out->push_back(id.get<int>());
  }
}

// generation_config.json speaks first, config.json where it is silent.
void ReadSpecialTokens(const json& generation, ModelSpec* spec, ConfigKeys& keys) {
  const auto find = [&](const char* key) -> const json* {
    const auto it = generation.find(key);
    return it != generation.end() && !it->is_null() ? &*it : keys.Find(key);
  };
  ReadTokens(find("eos_token_id"), "eos_token_id", spec->vocab, keys, &spec->eos_tokens);
  std::vector<int> bos;
  ReadTokens(find("bos_token_id"), "bos_token_id", spec->vocab, keys, &bos);
  if (!bos.empty()) spec->bos_token = bos.front();
}

void ReadShape(const FamilyTraits& family, ModelSpec* spec, ConfigKeys& keys) {
  const bool gemma3 = family.model_type == "gemma3_text";
  const auto defaulted = [&](int64_t value) {
    return gemma3 ? std::optional<int64_t>(value) : std::nullopt;
  };
  spec->family = std::string(family.model_type);
  spec->vocab = keys.Int("vocab_size", 1, kMaxVocab, defaulted(262208));
  spec->dim = keys.Int("hidden_size", 1, kMaxSize, defaulted(2304));
  spec->max_context = keys.Int("max_position_embeddings", 1, kMaxTokens, defaulted(131072));
  for (const char* key : {"rms_norm_eps", "layer_norm_eps"}) {
    if (keys.Has(key)) spec->norm_eps = static_cast<float>(keys.Number(key, 1e-12, 1));
  }
  spec->norm_plus_one = family.norm_plus_one;
  spec->layer_norm = family.layer_norm;
  spec->embedding_scale = EmbeddingScale(family, spec->dim, keys);
  spec->logit_scale = LogitScale(keys);
  spec->logit_softcap = static_cast<float>(
      keys.Number("final_logit_softcapping", 0, 1e9, family.model_type == "gemma2" ? 30 : 0));
  spec->tied_embeddings = keys.Bool("tie_word_embeddings", family.tied);
}

void ReadLayers(const FamilyTraits& family, ModelSpec* spec, ConfigKeys& keys) {
  const int layers =
      keys.Int("num_hidden_layers", 1, kMaxLayers,
               family.model_type == "gemma3_text" ? std::optional<int64_t>(26) : std::nullopt);
  const AttentionSpec shared = SharedAttention(family, spec->dim, keys);
  LayerSpec layer;
  layer.mlp = MlpOf(family, spec, keys);
  layer.pre_norms = family.norms != FamilyTraits::Norms::kPost;
  layer.post_norms = family.norms != FamilyTraits::Norms::kPre;
  layer.parallel = family.parallel;
  layer.residual_scale = static_cast<float>(keys.Number("residual_multiplier", 1e-6, 1e6, 1));
  const std::vector<LayerType> types = LayerTypesOf(family, layers, keys);

  std::array<std::optional<AttentionSpec>, 4> kinds;  // by LayerType, made when first met
  for (size_t i = 0; i < types.size() && keys.status().ok(); ++i) {
    const LayerType type = types[i];
    if (type == LayerType::kRecurrent) {
      layer.mixer = RecurrentSpec{.kind = family.recurrent.empty() ? "unknown"
                                                                   : std::string(family.recurrent)};
      spec->layers.push_back(layer);
      continue;
    }
    std::optional<AttentionSpec>& kind = kinds[static_cast<size_t>(type)];
    if (!kind) {
      kind = shared;
      if (type != LayerType::kFull) kind->window = WindowOf(type, family, keys);
      kind->chunked = type == LayerType::kChunked;
      kind->rope = RopeOf(type, family, shared.head_dim, spec, keys);
      if (kind->rope) kind->rope->interleaved = family.interleaved;
    }
    AttentionSpec attention = *kind;
    if (LayerLacksRope(static_cast<int>(i), keys)) attention.rope.reset();
    layer.mixer = attention;
    spec->layers.push_back(layer);
  }
}

// The family named by the config, and the object that describes its text model.
absl::StatusOr<const FamilyTraits*> FamilyOf(const json& text, const json& root) {
  for (const json* object : {&text, &root}) {
    const auto it = object->find("model_type");
    if (it == object->end()) continue;
    if (!it->is_string()) {
      return absl::InvalidArgumentError("config.json: model_type is not a string");
    }
    const auto& name = it->get_ref<const std::string&>();
    if (const FamilyTraits* family = FindFamily(name)) return family;
    return absl::InvalidArgumentError(
        absl::StrCat("config.json: model_type ", Quoted(name),
                     " is not known; what runs: ", SupportedFamilies()));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("config.json: model_type is missing; what runs: ", SupportedFamilies()));
}

// A config that cannot be read of a family that could not run: the reader should learn both.
absl::Status WithNeeds(const absl::Status& status, const FamilyTraits& family) {
  const std::vector<std::string> needs = NeedsOf(family);
  if (needs.empty()) return status;
  return absl::Status(status.code(),
                      absl::StrCat(status.message(), "; besides, ", family.model_type,
                                   " needs what is not supported: ", absl::StrJoin(needs, ", ")));
}

absl::StatusOr<json> ParseConfig(absl::string_view text, absl::string_view file) {
  if (text.size() > kMaxConfigBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, " has ", text.size(), " bytes, the limit is ", kMaxConfigBytes));
  }
  return ParseJsonObject(text, file, JsonLimits());
}

}  // namespace

absl::StatusOr<ModelSpec> SpecFromConfigJson(absl::string_view config,
                                             absl::string_view generation_config) {
  absl::StatusOr<json> root = ParseConfig(config, "config.json");
  if (!root.ok()) return root.status();
  json generation = json::object();
  if (!generation_config.empty()) {
    absl::StatusOr<json> parsed = ParseConfig(generation_config, "generation_config.json");
    if (!parsed.ok()) return parsed.status();
    generation = *std::move(parsed);
  }
  const auto nested = root->find("text_config");
  const bool has_text = nested != root->end() && nested->is_object();
  const json& text = has_text ? *nested : *root;
  absl::StatusOr<const FamilyTraits*> family = FamilyOf(text, *root);
  if (!family.ok()) return family.status();

  ModelSpec spec;
  ConfigKeys keys(text, has_text ? &*root : nullptr, "config.json");
  ReadShape(**family, &spec, keys);
  AddOtherNeeds(**family, &spec, keys);
  ReadLayers(**family, &spec, keys);
  ReadSpecialTokens(generation, &spec, keys);
  spec.name = spec.family;
  if (!keys.status().ok()) return WithNeeds(keys.status(), **family);
  absl::Status status = spec.Validate();
  if (!status.ok()) {
    return WithNeeds(absl::InvalidArgumentError(absl::StrCat("config.json: ", status.message())),
                     **family);
  }
  return spec;
}

}  // namespace longspan
