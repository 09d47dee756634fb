#include "models/family.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_join.h"
#include "models/gguf.h"
#include "tests/support/full_op_table.h"
#include "tests/support/gguf_writer.h"
#include "tests/support/paths.h"
#include "tests/support/safetensors_writer.h"

namespace longspan {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::FullOpTable;
using testing::GgufWriter;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const char kHybrid[] = R"({"model_type": "swa_hybrid", "vocab_size": 100, "hidden_size": 32,
  "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
  "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1000, "sliding_window": 16,
  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})";

// `base` with `patch` merged over it (null in the patch removes the key).
std::string Patched(const std::string& base, const std::string& patch) {
  nlohmann::json json = nlohmann::json::parse(base);
  json.merge_patch(nlohmann::json::parse(patch));
  return json.dump();
}

ModelSpec Read(const std::string& config, const std::string& generation = "") {
  auto spec = SpecFromConfigJson(config, generation);
  EXPECT_TRUE(spec.ok()) << spec.status() << "\n" << config;
  return spec.ok() ? *std::move(spec) : ModelSpec();
}

const AttentionSpec& Attention(const ModelSpec& spec, size_t layer) {
  return std::get<AttentionSpec>(spec.layers.at(layer).mixer);
}

std::string Error(const std::string& config, const std::string& generation = "") {
  return std::string(SpecFromConfigJson(config, generation).status().message());
}

TEST(SwaHybrid, ReadsTheShippedModel) {
  const auto checkpoint = Checkpoint::Open(testing::SourcePath("models/default"));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const auto spec = ReadSpec(**checkpoint);
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->parameters(), 18'145'152);  // as its card says
  EXPECT_EQ(spec->layers.size(), 10u);
  for (size_t i = 0; i < 10; ++i) {
    const AttentionSpec& a = Attention(*spec, i);
    EXPECT_EQ(a.window, i % 2 == 0 ? std::optional<int>(64) : std::nullopt) << i;
    EXPECT_EQ(a.rope.has_value(), i % 2 == 0) << i;
    EXPECT_FLOAT_EQ(a.scale, 0.125f);
  }
  EXPECT_THAT(MissingFor(*spec, FullOpTable()), IsEmpty());
  // Every slot has its tensor and every tensor its slot.
  const std::vector<Slot> slots = SlotsOf(*spec, (*checkpoint)->format());
  for (const Slot& slot : slots) EXPECT_TRUE(FindSlot(**checkpoint, slot).ok()) << slot.tensor;
  EXPECT_EQ(slots.size(), (*checkpoint)->tensors().size());
}

TEST(SwaHybrid, LayerTypesWinOverSlidingWindow) {
  const ModelSpec mixed = Read(kHybrid);
  EXPECT_EQ(Attention(mixed, 0).window, 16);
  EXPECT_EQ(Attention(mixed, 1).window, std::nullopt);
  const ModelSpec full = Read(Patched(
      kHybrid, R"({"layer_types": ["full_attention", "full_attention", "full_attention"]})"));
  EXPECT_EQ(full.window(), 0);
  const ModelSpec sliding = Read(Patched(kHybrid, R"({"layer_types": null})"));
  EXPECT_EQ(Attention(sliding, 1).window, 16);
  const ModelSpec neither =
      Read(Patched(kHybrid, R"({"layer_types": null, "sliding_window": null})"));
  EXPECT_EQ(neither.window(), 0);
}

TEST(SwaHybrid, ReadsBothRopeSchemas) {
  const ModelSpec plain = Read(Patched(kHybrid, R"({"rope_theta": 5000})"));
  EXPECT_EQ(Attention(plain, 0).rope->theta, 5000);
  EXPECT_EQ(Attention(plain, 1).rope->theta, 5000);
  EXPECT_EQ(Attention(plain, 1).rope->rotary_dim, 8);

  const ModelSpec local = Read(Patched(kHybrid, R"({"rope_theta": 5000, "rope_local_base_freq": 100,
                   "rope_scaling": {"rope_type": "linear", "factor": 4}})"));
  EXPECT_EQ(Attention(local, 0).rope->theta, 100);
  EXPECT_EQ(Attention(local, 0).rope->factor, 1);
  EXPECT_EQ(Attention(local, 1).rope->theta, 5000);
  EXPECT_EQ(Attention(local, 1).rope->factor, 4);
  EXPECT_EQ(Attention(local, 1).rope->scaling, RopeSpec::Scaling::kLinear);

  const ModelSpec flat =
      Read(Patched(kHybrid, R"({"rope_parameters": {"rope_type": "default", "rope_theta": 7000,
                                       "partial_rotary_factor": 0.5}})"));
  EXPECT_EQ(Attention(flat, 0).rope->theta, 7000);
  EXPECT_EQ(Attention(flat, 1).rope->rotary_dim, 4);

  const ModelSpec kinds = Read(Patched(kHybrid, R"({"rope_theta": 1, "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 300},
        "full_attention": {"rope_type": "linear", "factor": 2, "rope_theta": 900}}})"));
  EXPECT_EQ(Attention(kinds, 0).rope->theta, 300);
  EXPECT_EQ(Attention(kinds, 1).rope->theta, 900);
  EXPECT_EQ(Attention(kinds, 1).rope->factor, 2);
}

TEST(SwaHybrid, TakesNullForNoPositions) {
  // merge_patch drops nulls: the config is written out.
  std::string config = kHybrid;
  config.insert(config.rfind('}'), R"(, "rope_parameters": {"full_attention": null,
      "sliding_attention": {"rope_theta": 10000}})");
  const ModelSpec spec = Read(config);
  EXPECT_TRUE(Attention(spec, 0).rope.has_value());
  EXPECT_FALSE(Attention(spec, 1).rope.has_value());
}

TEST(SwaHybrid, DefaultsWhatConfigsLeaveOut) {
  const ModelSpec spec =
      Read(Patched(kHybrid, R"({"head_dim": null, "num_key_value_heads": null})"));
  EXPECT_EQ(Attention(spec, 0).head_dim, 8);
  EXPECT_EQ(Attention(spec, 0).kv_heads, 4);
  EXPECT_FALSE(spec.tied_embeddings);
  EXPECT_EQ(spec.embedding_scale, 1);
  EXPECT_EQ(spec.layers[0].mlp->activation, Activation::kSilu);
}

TEST(SwaHybrid, TakesEosFromTheGenerationConfigFirst) {
  const std::string config = Patched(kHybrid, R"({"eos_token_id": 1, "bos_token_id": 2})");
  EXPECT_THAT(Read(config).eos_tokens, ElementsAre(1));
  EXPECT_THAT(Read(config, R"({"eos_token_id": [3, 4]})").eos_tokens, ElementsAre(3, 4));
  EXPECT_THAT(Read(config, R"({"temperature": 1})").eos_tokens, ElementsAre(1));
  EXPECT_EQ(Read(config, R"({"bos_token_id": 5})").bos_token, 5);
  EXPECT_EQ(Read(config).bos_token, 2);
}

TEST(Config, RefusesEachBadValueByKeyValueAndLimit) {
  const struct {
    const char* patch;
    std::vector<const char*> parts;
  } kCases[] = {
      {R"({"num_hidden_layers": 0})", {"num_hidden_layers", "\"0\"", "1 to 1024"}},
      {R"({"num_hidden_layers": 1025})", {"num_hidden_layers", "1025", "1024"}},
      {R"({"num_hidden_layers": 18446744073709551615})", {"18446744073709551615", "1024"}},
      {R"({"num_hidden_layers": 3.0})", {"num_hidden_layers", "3.0", "whole number"}},
      {R"({"num_hidden_layers": "3"})", {"num_hidden_layers", "whole number"}},
      {R"({"num_hidden_layers": null})", {"num_hidden_layers is missing"}},
      {R"({"num_hidden_layers": 4})", {"layer_types has 3 entries", "num_hidden_layers is 4"}},
      {R"({"vocab_size": 16777217})", {"vocab_size", "16777217", "16777216"}},
      {R"({"vocab_size": -5})", {"vocab_size", "-5"}},
      {R"({"hidden_size": 0})", {"hidden_size"}},
      {R"({"hidden_size": 33, "head_dim": null})", {"hidden_size 33", "num_attention_heads 4"}},
      {R"({"num_attention_heads": 0})", {"num_attention_heads"}},
      {R"({"num_attention_heads": 1000000, "head_dim": 1000000})", {"1000000", "65536"}},
      {R"({"num_attention_heads": 65536, "head_dim": 65536, "num_key_value_heads": 1})",
       {"heads × head_dim", "4294967296", "2147483647"}},
      {R"({"num_key_value_heads": 3})", {"heads is 4", "kv_heads 3"}},
      {R"({"sliding_window": 0})", {"sliding_window", "\"0\"", "1 to"}},
      {R"({"sliding_window": -1})", {"sliding_window", "-1"}},
      {R"({"sliding_window": null})", {"sliding_window is missing"}},
      {R"({"max_position_embeddings": 0})", {"max_position_embeddings"}},
      {R"({"rms_norm_eps": 0})", {"rms_norm_eps"}},
      {R"({"rope_theta": 0})", {"rope_theta", "\"0\""}},
      {R"({"rope_theta": -1e4})", {"rope_theta", "-10000"}},
      {R"({"rope_theta": "nan"})", {"rope_theta", "nan"}},
      {R"({"rope_scaling": {"rope_type": "linear"}})", {"rope_scaling", "factor is missing"}},
      {R"({"rope_scaling": {"rope_type": "linear", "factor": 0}})", {"factor", "\"0\""}},
      {R"({"rope_scaling": 8})", {"rope_scaling is not an object"}},
      {R"({"rope_parameters": []})", {"rope_parameters is not an object"}},
      {R"({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})",
       {"rope_parameters has no sliding_attention"}},
      {R"({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}})",
       {"rope_parameters.sliding_attention", "rope_theta is missing"}},
      {R"({"rope_parameters": {"full_attention": 3, "sliding_attention": 3}})",
       {"rope_parameters.sliding_attention"}},
      {R"({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2}})",
       {"partial_rotary_factor", "\"2\""}},
      {R"({"layer_types": ["sliding_attention", "full_attention", "sideways"]})",
       {"layer_types[2]", "sideways"}},
      {R"({"layer_types": [1, 2, 3]})", {"layer_types[0]"}},
      {R"({"layer_types": "full_attention"})", {"layer_types"}},
      {R"({"eos_token_id": 100})", {"eos_token_id", "100", "vocab_size 100"}},
      {R"({"eos_token_id": [1, -1]})", {"eos_token_id", "-1"}},
      {R"({"eos_token_id": "</s>"})", {"eos_token_id"}},
      {R"({"tie_word_embeddings": "yes"})", {"tie_word_embeddings", "true or false"}},
      {R"({"hidden_act": 3})", {"hidden_act", "a string"}},
      {R"({"model_type": "unheard_of"})", {"model_type", "unheard_of", "swa_hybrid"}},
      {R"({"model_type": null})", {"model_type is missing"}},
      {R"({"model_type": 3})", {"model_type is not a string"}},
  };
  for (const auto& c : kCases) {
    const std::string error = Error(Patched(kHybrid, c.patch));
    EXPECT_NE(error, "") << c.patch;
    EXPECT_THAT(error, HasSubstr("config.json")) << c.patch;
    for (const char* part : c.parts) EXPECT_THAT(error, HasSubstr(part)) << c.patch;
  }
}

TEST(Config, RefusesBrokenJson) {
  EXPECT_THAT(Error(""), HasSubstr("config.json"));
  EXPECT_THAT(Error("[]"), HasSubstr("not an object"));
  EXPECT_THAT(Error("{\"a\": 1, \"a\": 2}"), AllOf(HasSubstr("\"a\""), HasSubstr("twice")));
  EXPECT_THAT(Error("{\"rope_theta\": NaN}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("{\"rope_theta\": 1e999}"), HasSubstr("not valid JSON"));
  EXPECT_THAT(Error("{\"a\":" + std::string(1000, '[') + std::string(1000, ']') + "}"),
              HasSubstr("nested deeper than 32"));
  std::string many = "{\"a\":[0";
  for (int i = 0; i < 100000; ++i) many += ",0";
  EXPECT_THAT(Error(many + "]}"), HasSubstr("100000"));
  EXPECT_THAT(Error(std::string((4 << 20) + 1, ' ')),
              AllOf(HasSubstr("4194305"), HasSubstr("4194304")));
  EXPECT_THAT(Error(kHybrid, "{"), HasSubstr("generation_config.json"));
}

// The text part of the published 4B multimodal config: what it leaves out has Gemma 3's defaults.
const char kGemma4B[] = R"({"architectures": ["Gemma3ForConditionalGeneration"],
  "eos_token_id": [1, 106], "model_type": "gemma3", "torch_dtype": "bfloat16",
  "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
    "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024}, "vision_config": {"hidden_size": 1152}})";

TEST(Gemma3, FillsInTheDefaultsOfASparseTextConfig) {
  const ModelSpec spec = Read(kGemma4B);
  EXPECT_EQ(spec.family, "gemma3_text");
  EXPECT_EQ(spec.layers.size(), 34u);
  EXPECT_EQ(spec.vocab, 262208);
  EXPECT_EQ(spec.max_context, 131072);
  EXPECT_TRUE(spec.tied_embeddings);
  EXPECT_TRUE(spec.norm_plus_one);
  EXPECT_THAT(spec.eos_tokens, ElementsAre(1, 106));
  for (size_t i = 0; i < 34; ++i) {
    const AttentionSpec& a = Attention(spec, i);
    const bool full = i % 6 == 5;
    EXPECT_EQ(a.heads, 8);
    EXPECT_EQ(a.kv_heads, 4);
    EXPECT_EQ(a.head_dim, 256);
    EXPECT_TRUE(a.qk_norm);
    EXPECT_FLOAT_EQ(a.scale, 1.0f / 16);
    EXPECT_EQ(a.window, full ? std::nullopt : std::optional<int>(1024)) << i;
    EXPECT_EQ(a.rope->theta, full ? 1e6 : 1e4) << i;
    EXPECT_EQ(a.rope->factor, full ? 8 : 1) << i;
    EXPECT_TRUE(spec.layers[i].post_norms && spec.layers[i].pre_norms);
    EXPECT_EQ(spec.layers[i].mlp->activation, Activation::kGeluTanh);
  }
  EXPECT_THAT(MissingFor(spec, FullOpTable()), IsEmpty());
}

// sqrt(2560) = 50.596…; bf16 keeps 8 significant bits: steps of 1/4 in [32, 64); half keeps 11:
// 1/32.
TEST(Gemma3, RoundsTheEmbeddingScaleToTheCheckpointsType) {
  EXPECT_EQ(Read(kGemma4B).embedding_scale, 50.5f);
  EXPECT_EQ(Read(Patched(kGemma4B, R"({"torch_dtype": "float16"})")).embedding_scale, 50.59375f);
  EXPECT_EQ(Read(Patched(kGemma4B, R"({"torch_dtype": "float32"})")).embedding_scale,
            static_cast<float>(std::sqrt(2560.0)));
  EXPECT_EQ(
      Read(Patched(kGemma4B, R"({"torch_dtype": null, "dtype": "bfloat16"})")).embedding_scale,
      50.5f);
}

TEST(Gemma3, ReadsScalesCapsAndPatterns) {
  const ModelSpec spec = Read(Patched(kGemma4B, R"({"text_config": {"query_pre_attn_scalar": 144,
      "attn_logit_softcapping": 50, "final_logit_softcapping": 30, "sliding_window_pattern": 2,
      "rope_local_base_freq": 5000}})"));
  EXPECT_FLOAT_EQ(Attention(spec, 0).scale, 1.0f / 12);
  EXPECT_EQ(Attention(spec, 0).softcap, 50);
  EXPECT_EQ(spec.logit_softcap, 30);
  EXPECT_EQ(Attention(spec, 0).rope->theta, 5000);
  EXPECT_TRUE(Attention(spec, 2).window.has_value());
  EXPECT_FALSE(Attention(spec, 1).window.has_value());
  EXPECT_THAT(MissingFor(spec, FullOpTable()), IsEmpty());
}

TEST(Gemma3, NamesTensorsAsTheCheckpointDoes) {
  ModelSpec spec = Read(kGemma4B);
  std::set<std::string> names;
  std::set<std::string> plus_one;
  for (const Slot& slot : SlotsOf(spec, Checkpoint::Format::kSafetensors)) {
    names.insert(slot.tensor);
    if (slot.plus_one) plus_one.insert(slot.tensor);
  }
  EXPECT_EQ(names.size(), 2 + 34u * 13);
  for (const char* name :
       {"model.layers.3.input_layernorm.weight", "model.layers.3.post_attention_layernorm.weight",
        "model.layers.3.pre_feedforward_layernorm.weight",
        "model.layers.3.post_feedforward_layernorm.weight",
        "model.layers.3.self_attn.q_norm.weight", "model.layers.3.self_attn.k_norm.weight",
        "model.norm.weight"}) {
    EXPECT_TRUE(plus_one.contains(name)) << name;
  }
  EXPECT_EQ(plus_one.size(), 1 + 34u * 6) << "the matrices are as they are";
  spec.tensor_prefix = "language_model.model.";
  spec.tied_embeddings = false;
  const std::vector<Slot> slots = SlotsOf(spec, Checkpoint::Format::kSafetensors);
  EXPECT_EQ(slots[0].tensor, "language_model.model.embed_tokens.weight");
  EXPECT_EQ(slots[2].tensor, "language_model.lm_head.weight");
}

TEST(Gemma3, FindsTheTextModelInsideAMultimodalCheckpoint) {
  for (const std::string prefix : {"model.", "language_model.model.", "model.language_model."}) {
    const std::string dir = testing::TempDir();
    testing::WriteFile(dir + "/config.json", kGemma4B);
    testing::WriteFile(
        dir + "/model.safetensors",
        testing::SafetensorsWriter().AddF32(prefix + "embed_tokens.weight", {1, 1}, {0}).Bytes());
    const auto checkpoint = Checkpoint::Open(dir);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(ReadSpec(**checkpoint)->tensor_prefix, prefix);
  }
}

TEST(FindSlot, NamesTensorAndBothShapes) {
  const std::string dir = testing::TempDir();
  testing::WriteFile(dir + "/config.json", kHybrid);
  testing::WriteFile(
      dir + "/model.safetensors",
      testing::SafetensorsWriter().AddF32("model.norm.weight", {3}, {1, 2, 3}).Bytes());
  const auto checkpoint = Checkpoint::Open(dir);
  ASSERT_TRUE(checkpoint.ok());
  const std::vector<Slot> slots = SlotsOf(*ReadSpec(**checkpoint), (*checkpoint)->format());
  EXPECT_THAT(std::string(FindSlot(**checkpoint, slots[0]).status().message()),
              AllOf(HasSubstr("model.embed_tokens.weight is missing"), HasSubstr("[100, 32]")));
  EXPECT_THAT(std::string(FindSlot(**checkpoint, slots[1]).status().message()),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("model.norm.weight"),
                    HasSubstr("[3]"), HasSubstr("[32]")));
}

TEST(OtherFamilies, RunWhenTheirMixersAreKnown) {
  for (const char* type : {"llama", "mistral", "qwen3", "gemma2"}) {
    const ModelSpec spec = Read(
        Patched(kHybrid, std::string(R"({"layer_types": null, "model_type": ")") + type + "\"}"));
    EXPECT_THAT(MissingFor(spec, FullOpTable()), IsEmpty()) << type;
  }
  const ModelSpec gemma2 =
      Read(Patched(kHybrid, R"({"layer_types": null, "model_type": "gemma2"})"));
  EXPECT_EQ(Attention(gemma2, 0).window, 16);
  EXPECT_EQ(Attention(gemma2, 1).window, std::nullopt);
  EXPECT_EQ(Attention(gemma2, 0).softcap, 50);
  EXPECT_EQ(gemma2.logit_softcap, 30);
}

// Shapes shortened from the published configs.
TEST(OtherFamilies, AreRefusedByTheNamesOfWhatIsMissing) {
  const struct {
    const char* patch;
    std::vector<const char*> needs;
  } kCases[] = {
      {R"({"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4,
           "attention_bias": true,
           "rope_scaling": {"rope_type": "yarn", "factor": 32, "truncate": false}})",
       {"attention sinks", "biases", "mixture of experts", "rope scaling yarn", "clamped SwiGLU"}},
      {R"({"model_type": "cohere2", "logit_scale": 0.0625})",
       {"LayerNorm", "parallel attention and MLP block", "logit scale"}},
      {R"({"model_type": "olmo3"})",
       {"post-norms without pre-norms", "QK-norm over the full width"}},
      {R"({"model_type": "exaone4", "layer_types": null, "sliding_window_pattern": "LLLG"})",
       {"post-norms without pre-norms"}},
      {R"({"model_type": "qwen2"})", {"biases on attention projections"}},
      {R"({"model_type": "qwen3_next", "num_experts": 512, "num_experts_per_tok": 10,
           "moe_intermediate_size": 512, "partial_rotary_factor": 0.25,
           "layer_types": ["linear_attention", "linear_attention", "full_attention"]})",
       {"recurrent mixer gated_delta", "mixture of experts", "output gate per element"}},
      {R"({"model_type": "nemotron_h", "layer_types": null, "sliding_window": null,
           "hybrid_override_pattern": "M-*"})",
       {"recurrent mixer mamba2", "relu2"}},
      {R"({"model_type": "llama4_text", "layer_types":
           ["chunked_attention", "chunked_attention", "full_attention"],
           "num_local_experts": 16, "no_rope_layers": [1, 1, 0], "attn_temperature_tuning": true})",
       {"chunked attention", "L2 QK-norm", "mixture of experts", "attention temperature tuning"}},
      {R"({"model_type": "gemma3n_text"})", {"AltUp", "Laurel", "per-layer embeddings"}},
      {R"({"model_type": "gemma4_text"})", {"value norm"}},
      {R"({"model_type": "afmoe"})", {"output gate per element", "mixture of experts"}},
      {R"({"model_type": "granitemoehybrid", "layer_types": ["mamba", "mamba", "attention"],
           "residual_multiplier": 0.22})",
       {"recurrent mixer mamba2", "residual scale"}},
      {R"({"model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention"]})",
       {"recurrent mixer short_conv"}},
      {R"({"model_type": "minimax"})", {"recurrent mixer lightning"}},
      {R"({"model_type": "kimi_linear"})", {"recurrent mixer kda"}},
      {R"({"model_type": "deepseek_v3"})", {"multi-head latent attention"}},
      // Features that a known family's config may ask for.
      {R"({"num_experts": 8, "num_experts_per_tok": 2})", {"mixture of experts"}},
      {R"({"attention_bias": true})", {"biases on attention projections"}},
      {R"({"mlp_bias": true})", {"biases on MLP projections"}},
      {R"({"hidden_act": "relu2"})", {"activation \"relu2\""}},
      {R"({"rope_scaling": {"rope_type": "longrope", "factor": 2}})",
       {"rope scaling \"longrope\""}},
      {R"({"rope_scaling": {"type": "llama3", "factor": 8}})", {"rope scaling llama3"}},
      {R"({"quantization_config": {"quant_method": "fp8"}})", {"quantization \"fp8\""}},
      {R"({"quantization_config": 1})", {"quantization unknown"}},
      {R"({"use_bidirectional_attention": true})", {"bidirectional attention"}},
      {R"({"layer_types": ["linear_attention", "full_attention", "full_attention"]})",
       {"recurrent mixer"}},
  };
  for (const auto& c : kCases) {
    const ModelSpec spec = Read(Patched(kHybrid, c.patch));
    const std::string missing = absl::StrJoin(MissingFor(spec, FullOpTable()), "; ");
    for (const char* need : c.needs) EXPECT_THAT(missing, HasSubstr(need)) << c.patch;
  }
}

TEST(OtherFamilies, AreNamedByWhatIsMissingEvenWhenTheConfigCannotBeRead) {
  EXPECT_THAT(Error(R"({"model_type": "gpt_oss"})"),
              AllOf(HasSubstr("is missing"), HasSubstr("attention sinks")));
  EXPECT_THAT(Error(R"({"model_type": "nemotron_h"})"), HasSubstr("recurrent mixer mamba2"));
  EXPECT_THAT(Error(R"({"model_type": "cohere2"})"), HasSubstr("parallel attention and MLP block"));
}

// Gemma 3 270M's shape, as its published file describes it.
GgufWriter Gemma270M() {
  GgufWriter w;
  w.String("general.architecture", "gemma3").U32("gemma3.block_count", 18);
  w.U32("gemma3.context_length", 32768).U32("gemma3.embedding_length", 640);
  w.U32("gemma3.feed_forward_length", 2048).U32("gemma3.attention.head_count", 4);
  w.U32("gemma3.attention.head_count_kv", 1).U32("gemma3.attention.key_length", 256);
  w.U32("gemma3.attention.value_length", 256).U32("gemma3.attention.sliding_window", 512);
  w.F32("gemma3.rope.freq_base", 1e6f).F32("gemma3.attention.layer_norm_rms_epsilon", 1e-6f);
  return w;
}

absl::StatusOr<ModelSpec> FromGguf(const GgufWriter& writer) {
  const std::string bytes = writer.Bytes();
  const auto file =
      ParseGguf({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}, "x.gguf");
  if (!file.ok()) return file.status();
  return SpecFromGguf(file->metadata);
}

const std::vector<std::string> kTokens(262144, "t");

TEST(Gemma3Gguf, ReadsTheShape) {
  const auto spec = FromGguf(Gemma270M()
                                 .Strings("tokenizer.ggml.tokens", kTokens)
                                 .U32("tokenizer.ggml.bos_token_id", 2)
                                 .U32("tokenizer.ggml.eos_token_id", 1)
                                 .U32("tokenizer.ggml.eot_token_id", 106));
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->family, "gemma3");
  EXPECT_EQ(spec->vocab, 262144);
  EXPECT_EQ(spec->parameters(), 268'098'176);  // as published
  EXPECT_EQ(spec->bos_token, 2);
  EXPECT_THAT(spec->eos_tokens, ElementsAre(1, 106));
  EXPECT_FALSE(spec->norm_plus_one) << "the file's norms already hold 1 + w";
  EXPECT_FLOAT_EQ(spec->embedding_scale, std::sqrt(640.0f));
  int full = 0;
  for (size_t i = 0; i < 18; ++i) {
    const AttentionSpec& a = Attention(*spec, i);
    const bool is_full = i == 5 || i == 11 || i == 17;
    full += a.window ? 0 : 1;
    EXPECT_EQ(a.window, is_full ? std::nullopt : std::optional<int>(512)) << i;
    EXPECT_EQ(a.rope->theta, is_full ? 1e6 : 1e4) << i;
    EXPECT_FLOAT_EQ(a.scale, 1.0f / 16);
  }
  EXPECT_EQ(full, 3);
  EXPECT_THAT(MissingFor(*spec, FullOpTable()), IsEmpty());
  const std::vector<Slot> slots = SlotsOf(*spec, Checkpoint::Format::kGguf);
  EXPECT_EQ(slots.size(), 2 + 18u * 13);
  for (const Slot& slot : slots) EXPECT_FALSE(slot.plus_one);
}

TEST(Gemma3Gguf, ReadsScalingPatternsAndListsPerLayer) {
  GgufWriter w = Gemma270M();
  w.U32("gemma3.vocab_size", 100).String("gemma3.rope.scaling.type", "linear");
  w.F32("gemma3.rope.scaling.factor", 8).U32("gemma3.attention.sliding_window_pattern", 2);
  w.F32("gemma3.rope.freq_base_swa", 5000);
  const auto spec = FromGguf(w);
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(Attention(*spec, 0).rope->theta, 5000);
  EXPECT_EQ(Attention(*spec, 0).rope->factor, 1);
  EXPECT_EQ(Attention(*spec, 1).rope->factor, 8);
  EXPECT_FALSE(Attention(*spec, 1).window.has_value());

  GgufWriter list;
  list.String("general.architecture", "gemma3").U32("gemma3.block_count", 2);
  list.U32("gemma3.context_length", 100).U32("gemma3.embedding_length", 8);
  list.U32("gemma3.feed_forward_length", 8).U32("gemma3.attention.head_count", 2);
  list.Array<int32_t>("gemma3.attention.head_count_kv", GgufWriter::kI32, {1, 2});
  list.U32("gemma3.attention.sliding_window", 4).U32("gemma3.vocab_size", 100);
  list.Array<uint8_t>("gemma3.attention.sliding_window_pattern", GgufWriter::kBool, {0, 1});
  const auto listed = FromGguf(list);
  ASSERT_TRUE(listed.ok()) << listed.status();
  EXPECT_EQ(Attention(*listed, 1).kv_heads, 2);
  EXPECT_FALSE(Attention(*listed, 0).window.has_value());
  EXPECT_TRUE(Attention(*listed, 1).window.has_value());
}

TEST(Gemma3Gguf, RefusesWhatIsMissingWrongOrOutOfBounds) {
  const auto error = [](const GgufWriter& w) {
    return std::string(FromGguf(w).status().message());
  };
  EXPECT_THAT(error(GgufWriter()), HasSubstr("general.architecture"));
  EXPECT_THAT(error(GgufWriter().U32("general.architecture", 3)), HasSubstr("not a string"));
  EXPECT_THAT(error(GgufWriter().String("general.architecture", "gpt-oss")),
              AllOf(HasSubstr("gpt-oss"), HasSubstr("attention sinks"), HasSubstr("gemma3")));
  EXPECT_THAT(error(GgufWriter().String("general.architecture", "rwkv7")), HasSubstr("rwkv7"));
  EXPECT_THAT(error(GgufWriter().String("general.architecture", "gemma3")),
              HasSubstr("is missing"));
  EXPECT_THAT(error(Gemma270M()), HasSubstr("gemma3.vocab_size is missing"));
  EXPECT_THAT(error(Gemma270M().Array<uint32_t>("tokenizer.ggml.tokens", GgufWriter::kU32, {1, 2})),
              AllOf(HasSubstr("tokenizer.ggml.tokens"), HasSubstr("strings")));
  EXPECT_THAT(error(Gemma270M().String("tokenizer.ggml.tokens", "a")), HasSubstr("strings"));
  EXPECT_THAT(error(Gemma270M()
                        .Strings("tokenizer.ggml.tokens", {"a", "b"})
                        .U32("tokenizer.ggml.eos_token_id", 2)),
              AllOf(HasSubstr("tokenizer.ggml.eos_token_id is 2"), HasSubstr("0 to 1")));
  EXPECT_THAT(error(Gemma270M().Strings("tokenizer.ggml.tokens", {})), HasSubstr("vocab is 0"));
  EXPECT_THAT(error(Gemma270M().U32("gemma3.vocab_size", 9).U32("split.count", 3)),
              HasSubstr("split.count"));
  EXPECT_THAT(
      error(Gemma270M().U32("gemma3.vocab_size", 9).F32("gemma3.final_logit_softcapping", NAN)),
      AllOf(HasSubstr("final_logit_softcapping"), HasSubstr("nan")));
  const auto with = [&](const char* key, uint32_t type, const std::string& raw) {
    GgufWriter w;
    w.String("general.architecture", "gemma3").U32("gemma3.vocab_size", 9);
    w.U32("gemma3.embedding_length", 8).U32("gemma3.context_length", 9);
    w.Key(key, type, raw);
    return error(w);
  };
  EXPECT_THAT(with("gemma3.block_count", GgufWriter::kU32, GgufWriter::Raw<uint32_t>(1025)),
              AllOf(HasSubstr("gemma3.block_count is 1025"), HasSubstr("1 to 1024")));
  EXPECT_THAT(with("gemma3.block_count", GgufWriter::kI32, GgufWriter::Raw<int32_t>(-1)),
              HasSubstr("gemma3.block_count is -1"));
  EXPECT_THAT(with("gemma3.block_count", GgufWriter::kF32, GgufWriter::Raw<float>(2)),
              HasSubstr("gemma3.block_count is not a whole number"));
  EXPECT_THAT(with("gemma3.attention.head_count", GgufWriter::kString, GgufWriter::Text("4")),
              HasSubstr("gemma3"));
}

}  // namespace
}  // namespace longspan
