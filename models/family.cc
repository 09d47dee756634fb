#include "models/family.h"

#include <array>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/checkpoint_file.h"
#include "models/checkpoint_json.h"

namespace longspan {
namespace {

constexpr size_t kMaxConfigFile = 16 << 20;

// The type that holds most of the weights' bytes.
DType MainDType(const Checkpoint& checkpoint) {
  std::map<DType, size_t> bytes;
  for (const auto& [name, tensor] : checkpoint.tensors()) bytes[tensor.dtype] += tensor.data.size();
  DType main = DType::kBF16;
  size_t most = 0;
  for (const auto& [dtype, size] : bytes) {
    if (size > most) std::tie(main, most) = std::pair(dtype, size);
  }
  return main;
}

std::string NameFromPath(const std::string& path) {
  std::filesystem::path p = std::filesystem::path(path).lexically_normal();
  if (!p.has_filename()) p = p.parent_path();
  if (p.filename() == "." || p.filename() == "..") {
    std::error_code error;
    const std::filesystem::path full = std::filesystem::canonical(p, error);
    if (!error) p = full;
  }
  if (p.filename() == "config.json" && p.has_parent_path()) return NameFromPath(p.parent_path());
  const bool file = p.extension() == ".gguf" || p.extension() == ".json";
  return file ? p.stem().string() : p.filename().string();
}

absl::Status InFile(const std::string& path, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
}

// Where multimodal checkpoints keep their text model.
std::string TensorPrefix(const Checkpoint& checkpoint) {
  for (const char* prefix : {"model.", "model.language_model.", "language_model.model."}) {
    if (checkpoint.Find(absl::StrCat(prefix, "embed_tokens.weight")) != nullptr) return prefix;
  }
  return "model.";
}

struct LayerNames {
  const char *mixer_norm, *q, *k, *v, *q_norm, *k_norm, *o, *mixer_post_norm, *mlp_norm, *gate, *up,
      *down, *mlp_post_norm, *sinks;
};

constexpr LayerNames kGgufNames = {"attn_norm.weight",     "attn_q.weight",
                                   "attn_k.weight",        "attn_v.weight",
                                   "attn_q_norm.weight",   "attn_k_norm.weight",
                                   "attn_output.weight",   "post_attention_norm.weight",
                                   "ffn_norm.weight",      "ffn_gate.weight",
                                   "ffn_up.weight",        "ffn_down.weight",
                                   "post_ffw_norm.weight", "attn_sinks.weight"};

// Hugging Face's post_attention_layernorm is the MLP's norm, except in a sandwich.
constexpr LayerNames HuggingFaceNames(bool sandwich) {
  return {"input_layernorm.weight",
          "self_attn.q_proj.weight",
          "self_attn.k_proj.weight",
          "self_attn.v_proj.weight",
          "self_attn.q_norm.weight",
          "self_attn.k_norm.weight",
          "self_attn.o_proj.weight",
          "post_attention_layernorm.weight",
          sandwich ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight",
          "mlp.gate_proj.weight",
          "mlp.up_proj.weight",
          "mlp.down_proj.weight",
          "post_feedforward_layernorm.weight",
          "self_attn.sinks"};
}

// Adds the slots of one attention layer.
class LayerSlots {
 public:
  LayerSlots(const ModelSpec& spec, int layer, std::string prefix, std::vector<Slot>* out)
      : spec_(spec), layer_(layer), prefix_(std::move(prefix)), out_(out) {}

  void Norm(Slot::Id id, const char* name, int64_t size) {
    out_->push_back({id, layer_, prefix_ + name, {size}, spec_.norm_plus_one});
  }
  void Matrix(Slot::Id id, const char* name, int64_t rows, int64_t columns) {
    out_->push_back({id, layer_, prefix_ + name, {rows, columns}});
  }
  void Vector(Slot::Id id, const char* name, int64_t size) {
    out_->push_back({id, layer_, prefix_ + name, {size}});
  }

 private:
  const ModelSpec& spec_;
  int layer_;
  std::string prefix_;
  std::vector<Slot>* out_;
};

void AddAttention(const AttentionSpec& a, const LayerSpec& layer, int64_t dim,
                  const LayerNames& names, LayerSlots& slots) {
  const int64_t q = int64_t{a.heads} * a.head_dim;
  const int64_t kv = int64_t{a.kv_heads} * a.head_dim;
  if (layer.pre_norms) slots.Norm(Slot::Id::kMixerNorm, names.mixer_norm, dim);
  slots.Matrix(Slot::Id::kQ, names.q, q, dim);
  slots.Matrix(Slot::Id::kK, names.k, kv, dim);
  slots.Matrix(Slot::Id::kV, names.v, kv, dim);
  if (a.qk_norm) slots.Norm(Slot::Id::kQNorm, names.q_norm, a.head_dim);
  if (a.qk_norm) slots.Norm(Slot::Id::kKNorm, names.k_norm, a.head_dim);
  if (a.sinks) slots.Vector(Slot::Id::kSinks, names.sinks, a.heads);
  slots.Matrix(Slot::Id::kO, names.o, dim, q);
  if (layer.post_norms) slots.Norm(Slot::Id::kMixerPostNorm, names.mixer_post_norm, dim);
}

void AddMlp(const MlpSpec& mlp, const LayerSpec& layer, int64_t dim, const LayerNames& names,
            LayerSlots& slots) {
  if (layer.pre_norms) slots.Norm(Slot::Id::kMlpNorm, names.mlp_norm, dim);
  slots.Matrix(Slot::Id::kGate, names.gate, mlp.intermediate, dim);
  slots.Matrix(Slot::Id::kUp, names.up, mlp.intermediate, dim);
  slots.Matrix(Slot::Id::kDown, names.down, dim, mlp.intermediate);
  if (layer.post_norms) slots.Norm(Slot::Id::kMlpPostNorm, names.mlp_post_norm, dim);
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::StatusOr<ModelSpec> ReadGgufSpec(const Checkpoint& checkpoint) {
  absl::StatusOr<ModelSpec> spec = SpecFromGguf(checkpoint.gguf());
  if (!spec.ok()) return InFile(checkpoint.path(), spec.status());
  spec->tied_embeddings = checkpoint.Find("output.weight") == nullptr;
  return spec;
}

absl::StatusOr<ModelSpec> ReadConfigSpec(const Checkpoint& checkpoint) {
  absl::StatusOr<std::string> config = checkpoint.ReadSideFile("config.json");
  if (!config.ok()) return config.status();
  absl::StatusOr<std::string> generation = checkpoint.ReadSideFile("generation_config.json");
  if (!generation.ok()) return generation.status();
  absl::StatusOr<ModelSpec> spec = SpecFromConfigJson(*config, *generation);
  if (!spec.ok()) return InFile(checkpoint.path(), spec.status());
  spec->tensor_prefix = TensorPrefix(checkpoint);
  return spec;
}

}  // namespace

absl::StatusOr<ModelSpec> ReadSpec(const Checkpoint& checkpoint) {
  const bool gguf = checkpoint.format() == Checkpoint::Format::kGguf;
  absl::StatusOr<ModelSpec> spec = gguf ? ReadGgufSpec(checkpoint) : ReadConfigSpec(checkpoint);
  if (!spec.ok()) return spec.status();
  spec->name = NameFromPath(checkpoint.path());
  spec->weight_dtype = MainDType(checkpoint);
  return spec;
}

absl::StatusOr<ModelSpec> ReadSpecAt(const std::string& path) {
  std::error_code error;
  const bool directory = std::filesystem::is_directory(path, error);
  if (!directory && !absl::EndsWithIgnoreCase(path, ".json")) {
    absl::StatusOr<std::unique_ptr<Checkpoint>> checkpoint = Checkpoint::Open(path);
    if (!checkpoint.ok()) return checkpoint.status();
    return ReadSpec(**checkpoint);
  }
  std::array<std::string, 2> texts;
  const char* const names[] = {"config.json", "generation_config.json"};
  for (size_t i = 0; i < (directory ? texts.size() : 1); ++i) {
    absl::StatusOr<std::string> file = directory ? PathInside(path, names[i]) : path;
    if (i > 0 && absl::IsNotFound(file.status())) continue;
    if (!file.ok()) return file.status();
    absl::StatusOr<std::string> text = ReadSmallFile(*file, kMaxConfigFile);
    if (!text.ok()) return text.status();
    texts[i] = *std::move(text);
  }
  absl::StatusOr<ModelSpec> spec = SpecFromConfigJson(texts[0], texts[1]);
  if (!spec.ok()) return InFile(path, spec.status());
  spec->name = NameFromPath(path);
  return spec;
}

std::vector<Slot> SlotsOf(const ModelSpec& spec, Checkpoint::Format format) {
  const bool gguf = format == Checkpoint::Format::kGguf;
  const std::string& prefix = spec.tensor_prefix;
  const std::string output = gguf                                ? "output.weight"
                             : prefix == "language_model.model." ? "language_model.lm_head.weight"
                                                                 : "lm_head.weight";
  const int64_t dim = spec.dim;
  std::vector<Slot> slots;
  slots.push_back({Slot::Id::kEmbedding,
                   -1,
                   gguf ? "token_embd.weight" : prefix + "embed_tokens.weight",
                   {spec.vocab, dim}});
  slots.push_back({Slot::Id::kFinalNorm,
                   -1,
                   gguf ? "output_norm.weight" : prefix + "norm.weight",
                   {dim},
                   spec.norm_plus_one});
  if (!spec.tied_embeddings) {
    slots.push_back({Slot::Id::kOutput, -1, output, {spec.vocab, dim}});
  }
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& layer = spec.layers[i];
    const LayerNames names = gguf ? kGgufNames : HuggingFaceNames(layer.post_norms);
    LayerSlots layer_slots(
        spec, static_cast<int>(i),
        gguf ? absl::StrCat("blk.", i, ".") : absl::StrCat(prefix, "layers.", i, "."), &slots);
    if (const auto* attention = std::get_if<AttentionSpec>(&layer.mixer)) {
      AddAttention(*attention, layer, dim, names, layer_slots);
    }
    if (layer.mlp && layer.mlp->experts == 0) AddMlp(*layer.mlp, layer, dim, names, layer_slots);
  }
  return slots;
}

absl::StatusOr<const TensorInfo*> FindSlot(const Checkpoint& checkpoint, const Slot& slot) {
  const TensorInfo* tensor = checkpoint.Find(slot.tensor);
  if (tensor == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(checkpoint.path(), ": tensor ", slot.tensor,
                                                   " is missing, the model needs it with shape ",
                                                   ShapeText(slot.shape)));
  }
  if (tensor->shape != slot.shape) {
    return absl::InvalidArgumentError(absl::StrCat(
        tensor->file, ": tensor ", slot.tensor, " has shape ", ShapeText(tensor->shape),
        ", the model's description asks for ", ShapeText(slot.shape)));
  }
  if (slot.shape.size() == 1 && IsQuantised(tensor->dtype)) {
    return absl::InvalidArgumentError(absl::StrCat(tensor->file, ": tensor ", slot.tensor, " is ",
                                                   Info(tensor->dtype).name,
                                                   ", a vector must be F32, F16 or BF16"));
  }
  return tensor;
}

}  // namespace longspan
