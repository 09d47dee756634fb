#include "models/family_table.h"

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace longspan {
namespace {

using Norms = FamilyTraits::Norms;
using Gate = FamilyTraits::Gate;

const std::vector<FamilyTraits>& Families() {
  static const auto& families = *new std::vector<FamilyTraits>{
      // What runs.
      {.model_type = "swa_hybrid"},
      {.model_type = "llama"},
      {.model_type = "mistral"},
      {.model_type = "qwen3", .qk_norm = true},
      {.model_type = "gemma2",
       .norms = Norms::kSandwich,
       .norm_plus_one = true,
       .gemma = true,
       .full_every = 2,
       .tied = true},
      {.model_type = "gemma3_text",
       .norms = Norms::kSandwich,
       .norm_plus_one = true,
       .qk_norm = true,
       .gemma = true,
       .full_every = 6,
       .tied = true},

      // What is understood and refused by the names of what is missing.
      {.model_type = "gemma3n_text",
       .norms = Norms::kSandwich,
       .qk_norm = true,
       .gemma = true,
       .full_every = 5,
       .tied = true,
       .also_needs = {"per-layer embeddings", "AltUp", "Laurel", "value norm",
                      "cache of an earlier layer"}},
      {.model_type = "gemma4_text",
       .norms = Norms::kSandwich,
       .qk_norm = true,
       .gemma = true,
       .full_every = 6,
       .tied = true,
       .also_needs = {"head size per layer kind", "value norm", "keys used as values",
                      "per-layer embeddings"}},
      {.model_type = "gpt_oss",
       .sinks = true,
       .bias = true,
       .full_every = 2,
       .also_needs = {"clamped SwiGLU", "MXFP4 experts"}},
      {.model_type = "cohere2",
       .layer_norm = true,
       .parallel = true,
       .nope_on_full = true,
       .interleaved = true,
       .full_every = 4,
       .tied = true},
      {.model_type = "cohere2_moe",
       .layer_norm = true,
       .parallel = true,
       .nope_on_full = true,
       .interleaved = true,
       .full_every = 4,
       .tied = true,
       .also_needs = {"mixture of experts"}},
      {.model_type = "olmo2", .norms = Norms::kPost, .also_needs = {"QK-norm over the full width"}},
      {.model_type = "olmo3",
       .norms = Norms::kPost,
       .full_every = 4,
       .also_needs = {"QK-norm over the full width"}},
      {.model_type = "olmo_hybrid",
       .norms = Norms::kPost,
       .full_every = 4,
       .recurrent = "gated_delta",
       .also_needs = {"QK-norm over the full width"}},
      {.model_type = "exaone4", .norms = Norms::kPost, .qk_norm = true, .nope_on_full = true},
      {.model_type = "exaone_moe",
       .norms = Norms::kPost,
       .qk_norm = true,
       .nope_on_full = true,
       .also_needs = {"mixture of experts"}},
      {.model_type = "afmoe",
       .norms = Norms::kSandwich,
       .qk_norm = true,
       .gate = Gate::kElement,
       .nope_on_full = true,
       .full_every = 4,
       .also_needs = {"mixture of experts"}},
      {.model_type = "smallthinker", .also_needs = {"mixture of experts", "ReLU experts"}},
      {.model_type = "mimo_v2",
       .sinks = true,
       .also_needs = {"head size of values", "heads per layer kind", "mixture of experts"}},
      {.model_type = "step3p5",
       .norm_plus_one = true,
       .gate = Gate::kHead,
       .also_needs = {"heads per layer kind", "mixture of experts"}},
      {.model_type = "llama4_text",
       .interleaved = true,
       .also_needs = {"chunked attention", "L2 QK-norm", "attention temperature tuning",
                      "mixture of experts"}},
      {.model_type = "smollm3"},
      {.model_type = "qwen2", .bias = true},
      {.model_type = "mixtral", .also_needs = {"mixture of experts"}},
      {.model_type = "qwen3_moe", .qk_norm = true, .also_needs = {"mixture of experts"}},
      {.model_type = "qwen3_next",
       .norm_plus_one = true,
       .qk_norm = true,
       .gate = Gate::kElement,
       .full_every = 4,
       .recurrent = "gated_delta"},
      {.model_type = "qwen3_5_text",
       .norm_plus_one = true,
       .qk_norm = true,
       .gate = Gate::kElement,
       .full_every = 4,
       .recurrent = "gated_delta"},
      {.model_type = "qwen3_5_moe_text",
       .norm_plus_one = true,
       .qk_norm = true,
       .gate = Gate::kElement,
       .full_every = 4,
       .recurrent = "gated_delta",
       .also_needs = {"mixture of experts"}},
      {.model_type = "nemotron_h",
       .recurrent = "mamba2",
       .also_needs = {"recurrent mixer mamba2", "layers of a mixer or an MLP alone",
                      "activation relu2"}},
      {.model_type = "jamba", .recurrent = "mamba", .also_needs = {"mixture of experts"}},
      {.model_type = "falcon_h1",
       .recurrent = "mamba2",
       .also_needs = {"attention and recurrent mixer mamba2 in parallel", "muP multipliers"}},
      {.model_type = "granitemoehybrid",
       .recurrent = "mamba2",
       .also_needs = {"recurrent mixer mamba2"}},
      {.model_type = "bamba", .recurrent = "mamba2", .also_needs = {"recurrent mixer mamba2"}},
      {.model_type = "zamba2",
       .recurrent = "mamba2",
       .also_needs = {"recurrent mixer mamba2", "weights of an earlier layer"}},
      {.model_type = "plamo2", .recurrent = "mamba2", .also_needs = {"recurrent mixer mamba2"}},
      {.model_type = "recurrentgemma",
       .recurrent = "rg_lru",
       .also_needs = {"recurrent mixer rg_lru"}},
      {.model_type = "mamba", .recurrent = "mamba", .also_needs = {"recurrent mixer mamba"}},
      {.model_type = "mamba2", .recurrent = "mamba2", .also_needs = {"recurrent mixer mamba2"}},
      {.model_type = "kimi_linear",
       .recurrent = "kda",
       .also_needs = {"recurrent mixer kda", "multi-head latent attention", "mixture of experts"}},
      {.model_type = "minimax",
       .recurrent = "lightning",
       .also_needs = {"recurrent mixer lightning", "mixture of experts"}},
      {.model_type = "minimax_m2",
       .also_needs = {"QK-norm over the full width", "mixture of experts"}},
      {.model_type = "bailing_moe_linear",
       .recurrent = "lightning",
       .also_needs = {"recurrent mixer lightning", "mixture of experts"}},
      {.model_type = "lfm2",
       .qk_norm = true,
       .recurrent = "short_conv",
       .also_needs = {"recurrent mixer short_conv"}},
      {.model_type = "lfm2_moe",
       .qk_norm = true,
       .recurrent = "short_conv",
       .also_needs = {"recurrent mixer short_conv", "mixture of experts"}},
      {.model_type = "deepseek_v2",
       .also_needs = {"multi-head latent attention", "mixture of experts"}},
      {.model_type = "deepseek_v3",
       .also_needs = {"multi-head latent attention", "mixture of experts"}},
  };
  return families;
}

}  // namespace

const FamilyTraits* FindFamily(absl::string_view model_type) {
  for (const FamilyTraits& family : Families()) {
    if (family.model_type == model_type || family.model_type == absl::StrCat(model_type, "_text")) {
      return &family;
    }
  }
  return nullptr;
}

std::string SupportedFamilies() {
  std::vector<absl::string_view> names;
  for (const FamilyTraits& family : Families()) {
    if (NeedsOf(family).empty()) names.push_back(family.model_type);
  }
  return absl::StrJoin(names, ", ");
}

std::vector<std::string> NeedsOf(const FamilyTraits& traits) {
  std::vector<std::string> needs(traits.also_needs.begin(), traits.also_needs.end());
  const auto add = [&](bool needed, std::string what) {
    if (needed && !absl::c_linear_search(needs, what)) needs.push_back(std::move(what));
  };
  add(traits.norms == Norms::kPost, "post-norms without pre-norms");
  add(traits.layer_norm, "LayerNorm");
  add(traits.parallel, "parallel attention and MLP block");
  add(traits.sinks, "attention sinks");
  add(traits.bias, "biases on attention projections");
  add(traits.gate == Gate::kHead, "attention output gate per head");
  add(traits.gate == Gate::kElement, "attention output gate per element");
  add(!traits.recurrent.empty(), absl::StrCat("recurrent mixer ", traits.recurrent));
  return needs;
}

}  // namespace longspan
