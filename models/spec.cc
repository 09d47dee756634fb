#include "models/spec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace longspan {
namespace {

constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxDim = 1 << 20;
constexpr int64_t kMaxHeads = 1 << 16;
constexpr int64_t kMaxHeadDim = 1 << 16;
constexpr int64_t kMaxTokens = 1 << 30;
constexpr int64_t kMaxExperts = 1 << 16;
constexpr int64_t kMaxStateBytes = int64_t{1} << 40;

// Collects the first broken bound.
class Bounds {
 public:
  explicit Bounds(std::string where) : where_(std::move(where)) {}

  void Within(absl::string_view field, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high) {
      Fail(absl::StrCat(field, " is ", value, ", it must be from ", low, " to ", high));
    }
  }
  void Finite(absl::string_view field, double value, double above, double high) {
    if (!std::isfinite(value) || value <= above || value > high) {
      Fail(absl::StrCat(field, " is ", value, ", it must be above ", above, " and at most ", high));
    }
  }
  // 0 stands for "none".
  void NoneOrPositive(absl::string_view field, double value) {
    if (value != 0) Finite(field, value, 0, 1e9);
  }
  void Product(absl::string_view field, int64_t a, int64_t b) {
    if (a * b > std::numeric_limits<int32_t>::max()) {
      Fail(absl::StrCat(field, " is ", a, " × ", b, " = ", a * b, ", the limit is ",
                        std::numeric_limits<int32_t>::max()));
    }
  }
  void Fail(absl::string_view text) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(absl::StrCat(where_, text));
  }
  const absl::Status& status() const { return status_; }

 private:
  std::string where_;
  absl::Status status_;
};

void CheckRope(const RopeSpec& rope, const AttentionSpec& attention, Bounds& bounds) {
  bounds.Finite("rope theta", rope.theta, 0, 1e15);
  bounds.Finite("rope factor", rope.factor, 0, 1e6);
  bounds.Within("rotary_dim", rope.rotary_dim, 2, attention.head_dim);
  if (rope.rotary_dim % 2 != 0) {
    bounds.Fail(absl::StrCat("rotary_dim is ", rope.rotary_dim, ", it must be even"));
  }
}

void CheckMixer(const AttentionSpec& a, Bounds& bounds) {
  bounds.Within("heads", a.heads, 1, kMaxHeads);
  bounds.Within("kv_heads", a.kv_heads, 1, kMaxHeads);
  bounds.Within("head_dim", a.head_dim, 1, kMaxHeadDim);
  if (!bounds.status().ok()) return;
  if (a.heads % a.kv_heads != 0) {
    bounds.Fail(absl::StrCat("heads is ", a.heads, ", not a multiple of kv_heads ", a.kv_heads));
  }
  bounds.Product("heads × head_dim", a.heads, a.head_dim);
  if (a.window) bounds.Within("window", *a.window, 1, kMaxTokens);
  if (a.chunked && !a.window) bounds.Fail("chunked attention has no window");
  bounds.Finite("attention scale", a.scale, 0, 1e6);
  bounds.NoneOrPositive("attention softcap", a.softcap);
  if (a.rope) CheckRope(*a.rope, a, bounds);
}

void CheckMixer(const RecurrentSpec& r, Bounds& bounds) {
  bounds.Within("state_bytes", r.state_bytes, 0, kMaxStateBytes);
}

void CheckEarlierLayer(absl::string_view field, const std::optional<int>& other, int layer,
                       Bounds& bounds) {
  if (other) bounds.Within(field, *other, 0, layer - 1);
}

absl::Status CheckLayer(const LayerSpec& layer, int index) {
  Bounds bounds(absl::StrCat("layer ", index, ": "));
  std::visit([&](const auto& mixer) { CheckMixer(mixer, bounds); }, layer.mixer);
  if (layer.mlp) {
    bounds.Within("intermediate", layer.mlp->intermediate, 1, kMaxDim);
    bounds.Within("experts", layer.mlp->experts, 0, kMaxExperts);
    bounds.Within("experts_per_token", layer.mlp->experts_per_token, 0, layer.mlp->experts);
  }
  bounds.Finite("residual_scale", layer.residual_scale, 0, 1e6);
  CheckEarlierLayer("cache_of", layer.cache_of, index, bounds);
  CheckEarlierLayer("weights_of", layer.weights_of, index, bounds);
  return bounds.status();
}

void CheckToken(absl::string_view field, int token, int vocab, Bounds& bounds) {
  bounds.Within(field, token, 0, vocab - 1);
}

}  // namespace

absl::Status ModelSpec::Validate() const {
  Bounds bounds("model: ");
  bounds.Within("layers", static_cast<int64_t>(layers.size()), 1, kMaxLayers);
  bounds.Within("vocab", vocab, 1, kMaxVocab);
  bounds.Within("dim", dim, 1, kMaxDim);
  bounds.Within("max_context", max_context, 1, kMaxTokens);
  bounds.Finite("norm_eps", norm_eps, 0, 1);
  bounds.Finite("embedding_scale", embedding_scale, 0, 1e6);
  bounds.Finite("logit_scale", logit_scale, 0, 1e6);
  bounds.NoneOrPositive("logit_softcap", logit_softcap);
  if (bos_token) CheckToken("bos_token", *bos_token, vocab, bounds);
  for (int token : eos_tokens) CheckToken("eos_token", token, vocab, bounds);
  if (!bounds.status().ok()) return bounds.status();
  for (size_t i = 0; i < layers.size(); ++i) {
    absl::Status status = CheckLayer(layers[i], static_cast<int>(i));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status ModelSpec::ValidateCache(DType cache_dtype) const {
  const int block = Info(cache_dtype).block_elements;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto* attention = std::get_if<AttentionSpec>(&layers[i].mixer);
    if (attention == nullptr || attention->head_dim % block == 0) continue;
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", i, ": head_dim is ", attention->head_dim, ", keys and values in ",
                     Info(cache_dtype).name, " need a multiple of ", block));
  }
  return absl::OkStatus();
}

int ModelSpec::window() const {
  int largest = 0;
  for (const LayerSpec& layer : layers) {
    const auto* attention = std::get_if<AttentionSpec>(&layer.mixer);
    if (attention != nullptr && attention->window) largest = std::max(largest, *attention->window);
  }
  return largest;
}

int64_t ModelSpec::parameters() const {
  const int64_t d = dim;
  int64_t total = vocab * d * (tied_embeddings ? 1 : 2) + d;
  for (const LayerSpec& layer : layers) {
    if (layer.weights_of) continue;
    const int norms = ((layer.pre_norms ? 1 : 0) + (layer.post_norms ? 1 : 0)) *
                      (layer.mlp && !layer.parallel ? 2 : 1);
    total += norms * d;
    if (const auto* a = std::get_if<AttentionSpec>(&layer.mixer)) {
      const int64_t q = int64_t{a->heads} * a->head_dim;
      const int64_t kv = int64_t{a->kv_heads} * a->head_dim;
      const int64_t kv_matrices = layer.cache_of ? 0 : (a->key_is_value ? 1 : 2);
      total += d * (2 * q + kv_matrices * kv);
      if (a->bias) total += q + kv_matrices * kv + d;
      if (a->qk_norm) total += 2 * int64_t{a->head_dim};
      if (a->sinks) total += a->heads;
      if (a->gate == AttentionSpec::Gate::kHead) total += d * a->heads;
      if (a->gate == AttentionSpec::Gate::kElement) total += d * q;
    }
    if (layer.mlp) {
      const int64_t experts = std::max(layer.mlp->experts, 1);
      total += experts * 3 * d * layer.mlp->intermediate;
      if (layer.mlp->experts > 0) total += d * experts;  // the router
    }
  }
  return total;
}

namespace {

CacheNeed Need(const AttentionSpec& a, DType cache_dtype) {
  const int64_t vectors = a.key_is_value ? 1 : 2;
  CacheNeed need = {.kind = a.window ? CacheKind::kRing : CacheKind::kPaged};
  need.bytes_per_token = vectors * a.kv_heads * BytesOf(cache_dtype, a.head_dim);
  need.window = a.window.value_or(0);
  return need;
}

CacheNeed Need(const RecurrentSpec& r, DType) {
  return {.kind = CacheKind::kState, .bytes_per_sequence = r.state_bytes};
}

// What is missing, in order of first appearance, with the layers that need it.
class Missing {
 public:
  void Add(const std::string& what, int layer = -1) {
    const auto known = std::find(names_.begin(), names_.end(), what);
    const auto index = static_cast<size_t>(known - names_.begin());
    if (index == names_.size()) {
      names_.push_back(what);
      layers_.emplace_back();
    }
    if (layer >= 0) layers_[index].push_back(layer);
  }

  std::vector<std::string> Take() const {
    std::vector<std::string> out;
    for (size_t i = 0; i < names_.size(); ++i) {
      out.push_back(layers_[i].empty() ? names_[i]
                                       : absl::StrCat(names_[i], " (", LayerList(layers_[i]), ")"));
    }
    return out;
  }

 private:
  static std::string LayerList(const std::vector<int>& layers) {
    constexpr size_t kShown = 4;
    const std::vector<int> first(
        layers.begin(), layers.begin() + static_cast<int>(std::min(layers.size(), kShown)));
    return absl::StrCat(
        layers.size() == 1 ? "layer " : "layers ", absl::StrJoin(first, ", "),
        layers.size() > kShown ? absl::StrCat(" and ", layers.size() - kShown, " more") : "");
  }

  std::vector<std::string> names_;
  std::vector<std::vector<int>> layers_;
};

const char* ScalingName(RopeSpec::Scaling scaling) {
  switch (scaling) {
    case RopeSpec::Scaling::kNone:
      return "none";
    case RopeSpec::Scaling::kLinear:
      return "linear";
    case RopeSpec::Scaling::kYarn:
      return "yarn";
    case RopeSpec::Scaling::kLlama3:
      return "llama3";
    case RopeSpec::Scaling::kDynamic:
      return "dynamic";
  }
  return "?";
}

void AddMissing(const AttentionSpec& a, int layer, Missing& missing) {
  if (a.sinks) missing.Add("attention sinks", layer);
  if (a.bias) missing.Add("biases on attention projections", layer);
  if (a.gate == AttentionSpec::Gate::kHead) missing.Add("attention output gate per head", layer);
  if (a.gate == AttentionSpec::Gate::kElement) {
    missing.Add("attention output gate per element", layer);
  }
  if (a.chunked) missing.Add("chunked attention", layer);
  if (a.key_is_value) missing.Add("keys used as values", layer);
  if (a.rope && a.rope->scaling != RopeSpec::Scaling::kNone &&
      a.rope->scaling != RopeSpec::Scaling::kLinear) {
    missing.Add(absl::StrCat("rope scaling ", ScalingName(a.rope->scaling)), layer);
  }
}

void AddMissing(const RecurrentSpec& r, int layer, Missing& missing) {
  missing.Add(absl::StrCat("recurrent mixer ", r.kind), layer);
}

void AddMissing(const LayerSpec& layer, int index, Missing& missing) {
  std::visit([&](const auto& mixer) { AddMissing(mixer, index, missing); }, layer.mixer);
  if (!layer.mlp) missing.Add("layers without an MLP", index);
  if (layer.mlp && layer.mlp->experts > 0) missing.Add("mixture of experts", index);
  if (layer.parallel) missing.Add("parallel attention and MLP block", index);
  if (!layer.pre_norms) missing.Add("post-norms without pre-norms", index);
  if (layer.residual_scale != 1) missing.Add("residual scale", index);
  if (layer.cache_of) missing.Add("cache of an earlier layer", index);
  if (layer.weights_of) missing.Add("weights of an earlier layer", index);
}

}  // namespace

CacheNeed NeedOf(const MixerSpec& mixer, DType cache_dtype) {
  return std::visit([&](const auto& m) { return Need(m, cache_dtype); }, mixer);
}

std::vector<std::string> MissingFor(const ModelSpec& spec, const OpTable& ops) {
  Missing missing;
  for (const std::string& need : spec.also_needs) missing.Add(need);
  if (spec.layer_norm) missing.Add("LayerNorm");
  if (spec.logit_scale != 1) missing.Add("logit scale");
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    AddMissing(spec.layers[i], static_cast<int>(i), missing);
  }
  const auto needs_op = [&](const auto& op, bool needed) {
    if (needed && op.function == nullptr) missing.Add(absl::StrCat("op ", OpName(op.id)));
  };
  needs_op(ops.Embed, true);
  needs_op(ops.RmsNorm, true);
  needs_op(ops.AddRmsNorm, true);
  needs_op(ops.MatMul, true);
  needs_op(ops.PrepareQkv, true);
  needs_op(ops.Attention, true);
  needs_op(ops.StoreKv, true);
  needs_op(ops.GatedMatMul, true);
  needs_op(ops.Gather, true);
  needs_op(ops.Softcap, spec.logit_softcap != 0);
  needs_op(ops.Sample, true);
  return missing.Take();
}

}  // namespace longspan
