#pragma once
// A model's architecture as a value: all that the code may know of it. A checkpoint's config.json
// or GGUF metadata is mapped to a ModelSpec (models/family.h); Validate() passes or nothing is
// loaded. Each field is one way in which real hybrid families differ; what no op can do yet is
// refused by name.
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "kernels/ops.h"

namespace longspan {

// Rotary position embedding of one layer kind; absent (NoPE) is std::nullopt in AttentionSpec.
struct RopeSpec {
  enum class Scaling : uint8_t { kNone, kLinear, kYarn, kLlama3, kDynamic };
  double theta = 10000;
  int rotary_dim = 0;  // dims of a head that rotate; == head_dim unless partial
  Scaling scaling = Scaling::kNone;
  double factor = 1;         // kLinear: positions are divided by it
  bool interleaved = false;  // pairs (2i, 2i+1) instead of (i, i + rotary_dim / 2)
};

struct AttentionSpec {
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  std::optional<int> window;  // a query sees itself and the window - 1 tokens before it
  std::optional<RopeSpec> rope;
  float scale = 0;       // of the logits, usually head_dim^-0.5
  float softcap = 0;     // 0: none
  bool qk_norm = false;  // RMSNorm over head_dim, before rope
  bool sinks = false;    // learned sink logit per head (gpt-oss)
  bool bias = false;     // on q, k, v and o
  enum class Gate : uint8_t { kNone, kHead, kElement } gate = Gate::kNone;  // sigmoid output gate
  bool chunked = false;       // Llama 4: attends within its own chunk of `window` tokens
  bool key_is_value = false;  // Gemma 4 global layers
};

// Recurrent mixers: named so that a config which has them is understood and refused by name. Their
// cache kind is a state slot (StateCache).
struct RecurrentSpec {
  std::string kind;         // "mamba2", "gated_delta", "lightning", "short_conv", …
  int64_t state_bytes = 0;  // per sequence
};

using MixerSpec = std::variant<AttentionSpec, RecurrentSpec>;

struct MlpSpec {
  int intermediate = 0;
  Activation activation = Activation::kSilu;
  int experts = 0;  // 0: dense
  int experts_per_token = 0;
};

struct LayerSpec {
  MixerSpec mixer;
  std::optional<MlpSpec> mlp;
  bool post_norms = false;        // sandwich: norms after mixer and MLP too (Gemma)
  bool pre_norms = true;          // false: only post norms (OLMo 3)
  bool parallel = false;          // mixer and MLP read the same norm (Cohere)
  float residual_scale = 1;       // muP (Granite)
  std::optional<int> cache_of;    // reads that layer's cache instead of its own (Gemma 3n)
  std::optional<int> weights_of;  // shares that layer's weights (Zamba 2)
};

struct ModelSpec {
  std::string name;    // what the checkpoint calls itself, or its folder
  std::string family;  // "swa_hybrid", "gemma3_text", …
  int vocab = 0;
  int dim = 0;
  float norm_eps = 1e-6f;
  bool norm_plus_one = false;  // checkpoint stores w, the norm multiplies by 1 + w; folded at load
  bool layer_norm = false;     // LayerNorm instead of RMSNorm (Cohere)
  float embedding_scale = 1;
  float logit_scale = 1;
  float logit_softcap = 0;       // 0: none
  bool tied_embeddings = false;  // the output matrix is the embedding table
  int max_context = 0;           // tokens
  std::vector<LayerSpec> layers;
  std::optional<int> bos_token;
  std::vector<int> eos_tokens;
  DType weight_dtype = DType::kBF16;  // of most weights; for display
  std::string tensor_prefix =
      "model.";  // of safetensors names ("model.language_model." in Gemma 3's)
  std::vector<std::string> also_needs;  // what the checkpoint asks for and no field above describes

  // Checks every bound (sizes positive and multiplying within int32, heads divisible by kv_heads,
  // finite floats, …): InvalidArgument names the layer, the field, its value and the limit.
  absl::Status Validate() const;
  // InvalidArgument where a head's keys and values are not whole blocks of `cache_dtype`.
  absl::Status ValidateCache(DType cache_dtype) const;
  // Largest window over its window layers; 0 when it has none.
  int window() const;
  int64_t parameters() const;  // computed from the shapes, tied weights once
};

// The cache kind is derived from the mixer, never declared.
enum class CacheKind : uint8_t { kPaged, kRing, kState };
struct CacheNeed {
  CacheKind kind;
  int64_t bytes_per_token = 0;     // kPaged: without bound; kRing: for at most `window` tokens
  int64_t bytes_per_sequence = 0;  // kState
  int window = 0;                  // kRing
};
CacheNeed NeedOf(const MixerSpec& mixer, DType cache_dtype);

// Names of what this spec needs and `ops` or the forward pass lacks: empty when the model can run.
std::vector<std::string> MissingFor(const ModelSpec& spec, const OpTable& ops);

// The table that `longspan describe` prints: layer | mixer | position | cache | bytes, then totals
// for `context` tokens and what is missing. Plain text, ends with a newline.
std::string Describe(const ModelSpec& spec, const OpTable& ops, DType cache_dtype, int64_t context);
// The same as one JSON object.
std::string DescribeJson(const ModelSpec& spec, const OpTable& ops, DType cache_dtype,
                         int64_t context);

}  // namespace longspan
