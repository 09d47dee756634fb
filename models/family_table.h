#pragma once
// What the model families that we know by name do that their config.json does not say. A family of
// known mixers is one row here; models/README.md tells how to add one.
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "models/spec.h"

namespace longspan {

struct FamilyTraits {
  enum class Norms : uint8_t { kPre, kSandwich, kPost };
  using Gate = AttentionSpec::Gate;

  absl::string_view model_type;  // of config.json (or of its text_config)
  Norms norms = Norms::kPre;     // kSandwich: before and after mixer and MLP
  bool norm_plus_one = false;    // the checkpoint stores w for a norm by 1 + w
  bool qk_norm = false;
  bool gemma = false;  // embeddings × sqrt(dim), query_pre_attn_scalar, hidden_activation
  bool layer_norm = false;
  bool parallel = false;
  bool sinks = false;
  bool bias = false;  // attention_bias when the config does not say
  Gate gate = Gate::kNone;
  bool nope_on_full = false;  // rope on window layers only
  bool interleaved = false;   // rope pairs (2i, 2i + 1)
  int full_every = 0;         // without a list or pattern: each n-th layer is full; 0: by window
  bool tied = false;          // tie_word_embeddings when the config does not say
  absl::string_view recurrent = "";          // kind of its linear_attention, mamba, … layers
  std::vector<const char*> also_needs = {};  // features that no ModelSpec field describes
};

// By model_type, also without its "_text"; nullptr when not known.
const FamilyTraits* FindFamily(absl::string_view model_type);

// model_types whose rows need nothing that is missing, for messages: "gemma3_text, llama, …".
std::string SupportedFamilies();

// What the row alone says is missing, for configs that cannot be read further.
std::vector<std::string> NeedsOf(const FamilyTraits& traits);

}  // namespace longspan
