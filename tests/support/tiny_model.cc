#include "tests/support/tiny_model.h"

#include <cmath>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/check.h"
#include "models/family.h"

namespace longspan::testing {
namespace {

class MemoryCheckpoint : public Checkpoint {
 public:
  explicit MemoryCheckpoint(std::string config)
      : Checkpoint("tiny model"), config_(std::move(config)) {}

  void Add(const std::string& name, const std::vector<int64_t>& shape, std::vector<float> values) {
    values_.push_back(std::move(values));
    TensorInfo tensor;
    tensor.name = name;
    tensor.shape = shape;
    tensor.file = "memory";
    tensor.data = absl::MakeConstSpan(reinterpret_cast<const std::byte*>(values_.back().data()),
                                      values_.back().size() * sizeof(float));
    tensors_[name] = tensor;
  }

  Format format() const override { return Format::kSafetensors; }
  absl::StatusOr<std::string> ReadSideFile(absl::string_view basename) const override {
    return basename == "config.json" ? config_ : std::string();
  }
  const GgufMetadata& gguf() const override { return gguf_; }

 private:
  std::string config_;
  GgufMetadata gguf_;
  std::vector<std::vector<float>> values_;
};

std::unique_ptr<Tokenizer> TinyTokenizer() {
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<int64_t> types = {2, 3, 3};  // unknown, control
  auto add = [&](const std::string& token, int64_t type) {
    tokens.push_back(token);
    types.push_back(type);
  };
  for (int byte = 0; byte < 256; ++byte) add(absl::StrFormat("<0x%02X>", byte), 6);
  for (char letter = 'a'; letter <= 'z'; ++letter) add(std::string(1, letter), 1);
  for (const char* piece : {"▁", "é", "th", "he", "in", "▁a", "▁t", "the", "▁the"}) add(piece, 1);
  std::vector<double> scores(tokens.size());
  for (size_t i = 0; i < scores.size(); ++i) scores[i] = -static_cast<double>(i);
  GgufMetadata metadata;
  metadata["tokenizer.ggml.model"] = std::string("llama");
  metadata["tokenizer.ggml.tokens"] = std::move(tokens);
  metadata["tokenizer.ggml.token_type"] = std::move(types);
  metadata["tokenizer.ggml.scores"] = std::move(scores);
  metadata["tokenizer.ggml.unknown_token_id"] = uint64_t{0};
  metadata["tokenizer.ggml.bos_token_id"] = uint64_t{1};
  metadata["tokenizer.ggml.eos_token_id"] = uint64_t{kTinyEos};
  auto tokenizer = Tokenizer::FromGguf(metadata);
  CHECK(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

std::string Config(const TinyOptions& options, int vocab) {
  std::vector<std::string> types;
  for (int l = 0; l < options.layers; ++l) {
    types.push_back(l % 2 == 0 ? R"("sliding_attention")" : R"("full_attention")");
  }
  return absl::StrFormat(
      R"({"model_type": "swa_hybrid", "vocab_size": %d, "hidden_size": 32, "intermediate_size": 48,
          "num_hidden_layers": %d, "num_attention_heads": %d, "num_key_value_heads": %d, "head_dim": 8,
          "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
          "sliding_window": %d, "max_position_embeddings": %d, "torch_dtype": "float32",
          "layer_types": [%s],
          "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                              "full_attention": null}})",
      vocab, options.layers, options.heads, options.heads / 2, options.window, options.max_context,
      absl::StrJoin(types, ", "));
}

}  // namespace

LoadedModel TinyModel(Backend& backend, const TinyOptions& options) {
  LoadedModel loaded;
  loaded.tokenizer = TinyTokenizer();
  const std::string config = Config(options, loaded.tokenizer->vocab_size());
  auto checkpoint = std::make_shared<MemoryCheckpoint>(config);
  const auto spec = SpecFromConfigJson(config, "");
  CHECK(spec.ok()) << spec.status();
  std::mt19937 random(options.seed);
  std::normal_distribution<float> normal;
  for (const Slot& slot : SlotsOf(*spec, Checkpoint::Format::kSafetensors)) {
    int64_t count = 1;
    for (int64_t n : slot.shape) count *= n;
    std::vector<float> values(count);
    const bool norm = slot.shape.size() == 1;
    // Larger than a trained model's, so that texts do not settle into loops.
    const float scale = norm ? 0.1f : 2 / std::sqrt(static_cast<float>(slot.shape.back()));
    for (float& x : values) x = (norm ? 1.0f : 0.0f) + scale * normal(random);
    checkpoint->Add(slot.tensor, slot.shape, std::move(values));
  }
  ModelOptions model_options;
  model_options.max_rows = options.max_rows;
  model_options.max_logit_rows = options.max_logit_rows;
  loaded.checkpoint = checkpoint;
  auto model = Model::Load(checkpoint, backend, model_options);
  CHECK(model.ok()) << model.status();
  loaded.model = *std::move(model);
  return loaded;
}

}  // namespace longspan::testing
