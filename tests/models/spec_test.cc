#include "models/spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "tests/support/full_op_table.h"

namespace longspan {
namespace {

using ::testing::ElementsAre;
using testing::FullOpTable;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

AttentionSpec& Attention(ModelSpec& spec, size_t layer) {
  return std::get<AttentionSpec>(spec.layers[layer].mixer);
}

// The paper's S1 shape: window and full layers in turn, rope on the window layers only.
ModelSpec S1() {
  ModelSpec spec;
  spec.name = "s1";
  spec.family = "swa_hybrid";
  spec.vocab = 8192;
  spec.dim = 384;
  spec.tied_embeddings = true;
  spec.max_context = 16384;
  for (int i = 0; i < 10; ++i) {
    AttentionSpec a;
    a.heads = 6;
    a.kv_heads = 2;
    a.head_dim = 64;
    a.scale = 0.125f;
    if (i % 2 == 0) {
      a.window = 64;
      a.rope = RopeSpec{.theta = 10000, .rotary_dim = 64};
    }
    LayerSpec layer;
    layer.mixer = a;
    layer.mlp = MlpSpec{.intermediate = 960};
    spec.layers.push_back(layer);
  }
  return spec;
}

struct Change {
  const char* what;  // part of the message that is expected
  std::function<void(ModelSpec&)> apply;
};

TEST(ModelSpec, PassesWhenEveryBoundHolds) { EXPECT_TRUE(S1().Validate().ok()); }

TEST(ModelSpec, RefusesEachBrokenBoundByLayerFieldValueAndLimit) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const Change kChanges[] = {
      {"layers is 0, it must be from 1 to 1024", [](ModelSpec& s) { s.layers.clear(); }},
      {"layers is 1025", [](ModelSpec& s) { s.layers.resize(1025, s.layers[0]); }},
      {"vocab is 0", [](ModelSpec& s) { s.vocab = 0; }},
      {"vocab is 16777217, it must be from 1 to 16777216",
       [](ModelSpec& s) { s.vocab = (1 << 24) + 1; }},
      {"dim is -1", [](ModelSpec& s) { s.dim = -1; }},
      {"max_context is 0", [](ModelSpec& s) { s.max_context = 0; }},
      {"norm_eps is 0", [](ModelSpec& s) { s.norm_eps = 0; }},
      {"norm_eps is nan", [=](ModelSpec& s) { s.norm_eps = kNan; }},
      {"embedding_scale is inf", [](ModelSpec& s) { s.embedding_scale = INFINITY; }},
      {"logit_scale is nan", [=](ModelSpec& s) { s.logit_scale = kNan; }},
      {"logit_softcap is -1", [](ModelSpec& s) { s.logit_softcap = -1; }},
      {"bos_token is 8192, it must be from 0 to 8191", [](ModelSpec& s) { s.bos_token = 8192; }},
      {"eos_token is -1",
       [](ModelSpec& s) {
         s.eos_tokens = {0, -1};
       }},
      {"layer 2: heads is 0", [](ModelSpec& s) { Attention(s, 2).heads = 0; }},
      {"layer 2: kv_heads is 0", [](ModelSpec& s) { Attention(s, 2).kv_heads = 0; }},
      {"layer 2: heads is 6, not a multiple of kv_heads 4",
       [](ModelSpec& s) { Attention(s, 2).kv_heads = 4; }},
      {"layer 1: head_dim is 65537", [](ModelSpec& s) { Attention(s, 1).head_dim = 65537; }},
      {"65536 × 65536 = 4294967296, the limit is 2147483647",
       [](ModelSpec& s) {
         Attention(s, 1).heads = 65536;
         Attention(s, 1).head_dim = 65536;
       }},
      {"layer 4: window is 0", [](ModelSpec& s) { Attention(s, 4).window = 0; }},
      {"layer 1: attention scale is nan", [=](ModelSpec& s) { Attention(s, 1).scale = kNan; }},
      {"layer 1: attention scale is 0", [](ModelSpec& s) { Attention(s, 1).scale = 0; }},
      {"attention softcap is nan", [=](ModelSpec& s) { Attention(s, 1).softcap = kNan; }},
      {"layer 0: rope theta is nan", [=](ModelSpec& s) { Attention(s, 0).rope->theta = kNan; }},
      {"layer 0: rope theta is 0", [](ModelSpec& s) { Attention(s, 0).rope->theta = 0; }},
      {"layer 0: rope factor is inf",
       [](ModelSpec& s) { Attention(s, 0).rope->factor = INFINITY; }},
      {"rotary_dim is 66, it must be from 2 to 64",
       [](ModelSpec& s) { Attention(s, 0).rope->rotary_dim = 66; }},
      {"rotary_dim is 33, it must be even",
       [](ModelSpec& s) { Attention(s, 0).rope->rotary_dim = 33; }},
      {"layer 3: intermediate is 0", [](ModelSpec& s) { s.layers[3].mlp->intermediate = 0; }},
      {"experts_per_token is 3, it must be from 0 to 2",
       [](ModelSpec& s) {
         s.layers[3].mlp->experts = 2;
         s.layers[3].mlp->experts_per_token = 3;
       }},
      {"layer 3: cache_of is 3, it must be from 0 to 2",
       [](ModelSpec& s) { s.layers[3].cache_of = 3; }},
      {"layer 3: weights_of is -1", [](ModelSpec& s) { s.layers[3].weights_of = -1; }},
      {"residual_scale is nan", [=](ModelSpec& s) { s.layers[3].residual_scale = kNan; }},
      {"chunked attention has no window", [](ModelSpec& s) { Attention(s, 1).chunked = true; }},
      {"state_bytes is -1",
       [](ModelSpec& s) {
         s.layers[3].mixer = RecurrentSpec{"mamba2", -1};
       }},
  };
  for (const Change& change : kChanges) {
    ModelSpec spec = S1();
    change.apply(spec);
    const absl::Status status = spec.Validate();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << change.what;
    EXPECT_THAT(std::string(status.message()), HasSubstr(change.what));
  }
}

// n = L (2d² + 2·d·128 + 3·d·2.5d + 2d) + d without embeddings: the paper's five sizes.
TEST(ModelSpec, CountsThePapersParameters) {
  const struct {
    int layers, dim, heads;
    int64_t published;
  } kSizes[] = {{10, 384, 6, 14'999'424},
                {12, 512, 8, 31'470'080},
                {16, 640, 10, 64'901'760},
                {18, 768, 12, 104'427'264},
                {30, 1280, 20, 476'852'480}};
  for (const auto& size : kSizes) {
    ModelSpec spec = S1();
    spec.dim = size.dim;
    spec.layers.resize(static_cast<size_t>(size.layers), spec.layers[0]);
    for (size_t i = 0; i < spec.layers.size(); ++i) {
      Attention(spec, i).heads = size.heads;
      spec.layers[i].mlp->intermediate = size.dim * 5 / 2;
    }
    const int64_t embeddings = int64_t{spec.vocab} * spec.dim;
    EXPECT_EQ(spec.parameters(), size.published + embeddings) << "tied weights count once";
    spec.tied_embeddings = false;
    EXPECT_EQ(spec.parameters(), size.published + 2 * embeddings);
  }
}

TEST(ModelSpec, NamesItsLargestWindow) {
  ModelSpec spec = S1();
  Attention(spec, 4).window = 100;
  EXPECT_EQ(spec.window(), 100);
  for (size_t i = 0; i < spec.layers.size(); ++i) Attention(spec, i).window.reset();
  EXPECT_EQ(spec.window(), 0);
}

TEST(CacheNeed, FollowsFromTheMixer) {
  AttentionSpec a;
  a.heads = 6;
  a.kv_heads = 2;
  a.head_dim = 64;
  CacheNeed need = NeedOf(a, DType::kBF16);
  EXPECT_EQ(need.kind, CacheKind::kPaged);
  EXPECT_EQ(need.bytes_per_token, 2 * 2 * 64 * 2);  // k and v, heads, dims, bytes
  EXPECT_EQ(NeedOf(a, DType::kF32).bytes_per_token, 2 * 2 * 64 * 4);
  a.window = 128;
  need = NeedOf(a, DType::kBF16);
  EXPECT_EQ(need.kind, CacheKind::kRing);
  EXPECT_EQ(need.window, 128);
  need = NeedOf(RecurrentSpec{"mamba2", 1000}, DType::kBF16);
  EXPECT_EQ(need.kind, CacheKind::kState);
  EXPECT_EQ(need.bytes_per_sequence, 1000);
  EXPECT_EQ(need.bytes_per_token, 0);
}

TEST(MissingFor, IsEmptyForWhatTheForwardPassDoes) {
  ModelSpec spec = S1();
  EXPECT_THAT(MissingFor(spec, FullOpTable()), IsEmpty());
  spec.layers[0].post_norms = true;
  Attention(spec, 0).qk_norm = true;
  Attention(spec, 0).softcap = 50;
  Attention(spec, 0).rope->scaling = RopeSpec::Scaling::kLinear;
  Attention(spec, 0).rope->rotary_dim = 32;
  Attention(spec, 0).rope->interleaved = true;
  spec.logit_softcap = 30;
  spec.embedding_scale = 20;
  spec.tied_embeddings = false;
  EXPECT_THAT(MissingFor(spec, FullOpTable()), IsEmpty());
}

TEST(MissingFor, NamesEachFeatureAndItsLayers) {
  using Scaling = RopeSpec::Scaling;
  const Change kChanges[] = {
      {"attention sinks (layer 1)", [](ModelSpec& s) { Attention(s, 1).sinks = true; }},
      {"biases on attention projections (layer 1)",
       [](ModelSpec& s) { Attention(s, 1).bias = true; }},
      {"attention output gate per head (layer 1)",
       [](ModelSpec& s) { Attention(s, 1).gate = AttentionSpec::Gate::kHead; }},
      {"attention output gate per element (layer 1)",
       [](ModelSpec& s) { Attention(s, 1).gate = AttentionSpec::Gate::kElement; }},
      {"chunked attention (layer 0)", [](ModelSpec& s) { Attention(s, 0).chunked = true; }},
      {"keys used as values (layer 1)", [](ModelSpec& s) { Attention(s, 1).key_is_value = true; }},
      {"rope scaling yarn (layer 0)",
       [](ModelSpec& s) { Attention(s, 0).rope->scaling = Scaling::kYarn; }},
      {"rope scaling llama3 (layer 0)",
       [](ModelSpec& s) { Attention(s, 0).rope->scaling = Scaling::kLlama3; }},
      {"rope scaling dynamic (layer 0)",
       [](ModelSpec& s) { Attention(s, 0).rope->scaling = Scaling::kDynamic; }},
      {"recurrent mixer mamba2 (layer 3)",
       [](ModelSpec& s) {
         s.layers[3].mixer = RecurrentSpec{"mamba2", 8};
       }},
      {"mixture of experts (layer 3)", [](ModelSpec& s) { s.layers[3].mlp->experts = 8; }},
      {"layers without an MLP (layer 3)", [](ModelSpec& s) { s.layers[3].mlp.reset(); }},
      {"post-norms without pre-norms (layer 3)",
       [](ModelSpec& s) { s.layers[3].pre_norms = false; }},
      {"parallel attention and MLP block (layer 3)",
       [](ModelSpec& s) { s.layers[3].parallel = true; }},
      {"residual scale (layer 3)", [](ModelSpec& s) { s.layers[3].residual_scale = 0.5f; }},
      {"cache of an earlier layer (layer 3)", [](ModelSpec& s) { s.layers[3].cache_of = 1; }},
      {"weights of an earlier layer (layer 3)", [](ModelSpec& s) { s.layers[3].weights_of = 1; }},
      {"LayerNorm", [](ModelSpec& s) { s.layer_norm = true; }},
      {"logit scale", [](ModelSpec& s) { s.logit_scale = 0.0625f; }},
      {"AltUp", [](ModelSpec& s) { s.also_needs = {"AltUp"}; }},
  };
  for (const Change& change : kChanges) {
    ModelSpec spec = S1();
    change.apply(spec);
    EXPECT_THAT(MissingFor(spec, FullOpTable()), ElementsAre(change.what));
  }
}

TEST(MissingFor, NamesManyLayersShortly) {
  ModelSpec spec = S1();
  for (size_t i = 0; i < spec.layers.size(); ++i) Attention(spec, i).sinks = true;
  EXPECT_THAT(MissingFor(spec, FullOpTable()),
              ElementsAre("attention sinks (layers 0, 1, 2, 3 and 6 more)"));
}

TEST(MissingFor, NamesOpsThatABackendLacks) {
  OpTable ops = FullOpTable();
  ops.PrepareQkv.function = nullptr;
  ops.Softcap.function = nullptr;
  ModelSpec spec = S1();
  EXPECT_THAT(MissingFor(spec, ops), ElementsAre("op PrepareQkv")) << "no softcap in this model";
  spec.logit_softcap = 30;
  EXPECT_THAT(MissingFor(spec, ops), ElementsAre("op PrepareQkv", "op Softcap"));
}

}  // namespace
}  // namespace longspan
