// Laws of the forward pass, on tiny random models and every instruction set of this machine.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <random>
#include <type_traits>

#include "tests/support/full_op_table.h"
#include "tests/support/golden.h"
#include "tests/support/host_backend.h"
#include "tests/support/model_runner.h"
#include "tests/support/paths.h"

namespace longspan {
namespace {

using ::testing::HasSubstr;
using testing::LoadTestModel;
using testing::ModelRunner;

std::vector<int32_t> RandomTokens(int count, int vocab, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % vocab);
  return tokens;
}

struct Setting {
  const char* model;
  const char* simd;
  DType cache;
};

// Ops that only tell what was made for the next product, and whether that took it so.
struct Watch : BackendContext {
  Watch(DType narrow, int narrow_parts) : narrow(narrow), narrow_parts(narrow_parts) {}
  DType Input(const MatMulArgs& product) const {
    return product.part_count == narrow_parts ? narrow : DType::kF32;
  }
  DType narrow;
  int narrow_parts;
  bool by_attention = false;  // made
  View made;
  size_t products = 0;
};

class NarrowBackend : public HostBackend {
 public:
  explicit NarrowBackend(Watch& watch) : HostBackend(Ops(), &watch), watch_(watch) {}
  DType ProductInput(const MatMulArgs& product) const override { return watch_.Input(product); }

 private:
  template <class Args>
  static void Make(BackendContext& context, const Args& args) {
    if (args.out.empty()) return;
    static_cast<Watch&>(context).made = args.out;
    static_cast<Watch&>(context).by_attention = std::is_same_v<Args, AttentionArgs>;
  }
  static OpTable Ops() {
    OpTable ops = testing::FullOpTable();
    ops.RmsNorm.function = Make;
    ops.AddRmsNorm.function = Make;
    ops.Attention.function = Make;
    ops.MatMul.function = [](BackendContext& context, const MatMulArgs& a) {
      Take(context, a, /*gated=*/false);
    };
    ops.GatedMatMul.function = [](BackendContext& context, const GatedMatMulArgs& a) {
      Take(context, a.product, /*gated=*/true);
      Make(context, a);
    };
    return ops;
  }
  static void Take(BackendContext& context, const MatMulArgs& a, bool gated) {
    auto& watch = static_cast<Watch&>(context);
    ++watch.products;
    EXPECT_EQ(a.x.data, watch.made.data);
    EXPECT_EQ(a.x.elements(), watch.made.elements());
    EXPECT_EQ(a.x.stride[0], watch.made.stride[0]);
    const bool as_is = watch.by_attention && watch.narrow == DType::kI8;
    EXPECT_EQ(a.x.dtype, as_is ? DType::kF32 : watch.Input(a));
    EXPECT_EQ(watch.made.dtype, a.x.dtype);
    EXPECT_EQ(a.out.dtype, gated && a.x.dtype == DType::kBF16 ? DType::kBF16 : DType::kF32);
  }
  const Watch& watch_;
};

TEST(ProductInputs, AreMadeInTheTypeThatTheBackendTakes) {
  for (DType narrow : {DType::kBF16, DType::kI8}) {
    for (int narrow_parts : {0, 1, 2, 3}) {
      Watch watch(narrow, narrow_parts);
      NarrowBackend backend(watch);
      const auto model =
          LoadTestModel(testing::SourcePath("tests/golden/swa_hybrid_nope"), backend, DType::kBF16);
      ModelRunner(backend, *model, 1, 64).Feed(0, RandomTokens(20, 50, 1), 20);
      EXPECT_EQ(watch.products, 4 * model->spec().layers.size() + 1);
    }
  }
}

class Forward : public ::testing::TestWithParam<Setting> {
 protected:
  Forward()
      : backend_(Backend::Cpu({.threads = 2, .simd = GetParam().simd})),
        model_(LoadTestModel(Path(), *backend_, GetParam().cache)) {}
  static std::string Path() { return testing::SourcePath(GetParam().model); }
  std::vector<int32_t> Tokens(int count, uint32_t seed) const {
    return RandomTokens(count, model_->spec().vocab, seed);
  }
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Model> model_;
};
INSTANTIATE_TEST_SUITE_P(
    Models, Forward,
    ::testing::Values(Setting{"tests/golden/swa_hybrid_nope", "", DType::kBF16},
                      Setting{"tests/golden/swa_hybrid_scaled", "portable", DType::kBF16},
                      Setting{"tests/golden/gemma3_linear_rope", "", DType::kF32},
                      Setting{"models/default", "", DType::kQ8_0}),
    [](const auto& info) {
      return std::filesystem::path(info.param.model).filename().string() + "_" +
             (*info.param.simd ? info.param.simd : "best");
    });

TEST_P(Forward, ChunkingChangesNoBitOfLogitsAndCaches) {
  const std::vector<int32_t> tokens = Tokens(150, 1);
  ModelRunner whole(*backend_, *model_, 1, 256);
  const std::vector<float> expected = whole.Feed(0, tokens, 150);
  for (int chunk : {1, 7, 64}) {
    ModelRunner runner(*backend_, *model_, 1, 256);
    EXPECT_EQ(runner.Feed(0, tokens, chunk), expected) << "chunk " << chunk;
    for (size_t l = 0; l < model_->spec().layers.size(); ++l) {
      EXPECT_EQ(runner.Visible(l, 0), whole.Visible(l, 0)) << "chunk " << chunk << " layer " << l;
    }
  }
}

TEST_P(Forward, ABatchEqualsItsSequencesOneByOne) {
  const int sequences = 5;
  std::vector<std::vector<int32_t>> tokens;
  std::vector<std::vector<float>> alone(sequences), together(sequences);
  for (int s = 0; s < sequences; ++s) {
    tokens.push_back(Tokens(20 + 13 * s, s));
    ModelRunner runner(*backend_, *model_, 1, 256);
    alone[s] = runner.Feed(0, tokens[s], 64);
  }
  ModelRunner runner(*backend_, *model_, sequences, 256);
  std::mt19937 random(3);
  std::vector<size_t> done(sequences);
  const size_t vocab = model_->spec().vocab;
  while (true) {  // random shares of random sequences
    std::vector<std::vector<int32_t>> step(sequences);
    bool any = false, left = false;
    for (int s = 0; s < sequences; ++s) {
      const size_t count = std::min<size_t>(random() % 9, tokens[s].size() - done[s]);
      step[s].assign(tokens[s].begin() + done[s], tokens[s].begin() + done[s] + count);
      any |= count > 0;
      left |= done[s] < tokens[s].size();
    }
    if (!left) break;
    if (!any) continue;
    const std::vector<float> logits = runner.Step(step);
    size_t at = 0;
    for (int s = 0; s < sequences; ++s) {
      const size_t end = at + step[s].size() * vocab;
      together[s].insert(together[s].end(), logits.begin() + at, logits.begin() + end);
      done[s] += step[s].size();
      at = end;
    }
  }
  for (int s = 0; s < sequences; ++s) EXPECT_EQ(together[s], alone[s]) << "sequence " << s;
}

TEST_P(Forward, ThreadsAndPageSizeChangeNoBit) {
  const std::vector<int32_t> tokens = Tokens(90, 2);
  ModelRunner here(*backend_, *model_, 1, 128);
  const std::vector<float> expected = here.Feed(0, tokens, 30);
  const auto single = Backend::Cpu({.threads = 1, .simd = GetParam().simd});
  const auto model = LoadTestModel(Path(), *single, GetParam().cache);
  ModelRunner there(*single, *model, 1, 128, /*page_tokens=*/32);
  EXPECT_EQ(there.Feed(0, tokens, 30), expected);
}

TEST_P(Forward, ObservingSpansChangesNoBit) {
  const std::vector<int32_t> tokens = Tokens(60, 4);
  ModelRunner plain(*backend_, *model_, 1, 128), observed(*backend_, *model_, 1, 128);
  observed.observe = true;
  EXPECT_EQ(observed.Feed(0, tokens, 9), plain.Feed(0, tokens, 9));
}

TEST(Forward, StoresKeysApartOnlyWhereASequenceHasSeveralRows) {
  const auto backend = Backend::Cpu({.threads = 1});
  const auto model = LoadTestModel(testing::SourcePath("tests/golden/swa_hybrid_nope"), *backend);
  ModelRunner runner(*backend, *model, 2, 64);
  const std::atomic<int64_t>& calls = backend->Profile(OpId::kStoreKv).calls;
  runner.Step({{1}, {2}});
  EXPECT_EQ(calls, 0);
  runner.Step({{3, 4}, {5}});
  EXPECT_EQ(calls, model->spec().layers.size());
}

TEST(Forward, MultipliesTheVocabularyOnlyForRowsThatNeedLogits) {
  const auto backend = Backend::Cpu({.threads = 1});
  const auto model = LoadTestModel(testing::SourcePath("tests/golden/swa_hybrid_nope"), *backend);
  const int rows = 10;
  std::vector<int32_t> tokens = RandomTokens(rows, 96, 1), positions(rows);
  for (int i = 0; i < rows; ++i) positions[i] = i;
  const int32_t row_begin[] = {0, rows}, start[] = {0}, wanted[] = {rows - 1};
  // Caches of one page of 16 tokens for every layer: 2 KV heads of 8, keys and values, F32.
  std::vector<std::byte> arena(2 * 2 * 16 * 8 * 4);
  const int32_t table[] = {0};
  KvView view;
  view.arena = arena.data();
  view.value_offset = 2 * 16 * 8 * 4;
  view.dtype = DType::kF32;
  view.page_tokens = 16;
  view.kv_heads = 2;
  view.head_dim = 8;
  view.table = table;
  view.table_stride = 1;
  view.slots = 1;
  const std::vector<KvView> caches(4, view);
  longspan::Step step;
  step.tokens = View::Vector(tokens.data(), DType::kI32, rows);
  step.positions = View::Vector(positions.data(), DType::kI32, rows);
  step.batch = {1, rows, row_begin, start};
  step.caches = caches.data();
  step.logit_rows = View::Vector(const_cast<int32_t*>(wanted), DType::kI32, 0);
  const auto flops = [&] { return backend->Profile(OpId::kMatMul).flops.load(); };
  const int64_t before = flops();
  EXPECT_EQ(model->Forward(step).elements(), 0);
  const int64_t none = flops() - before;
  step.logit_rows = View::Vector(const_cast<int32_t*>(wanted), DType::kI32, 1);
  EXPECT_EQ(model->Forward(step).elements(), 96);
  const int64_t one = flops() - before - none;
  EXPECT_EQ(one - none, 2 * 32 * 96);  // one row of 32 numbers by 96 tokens
}

// A copy of the tiny model's folder whose config differs.
std::string WithConfig(const std::string& key, const nlohmann::json& value) {
  const std::string from = testing::SourcePath("tests/golden/swa_hybrid_nope");
  const std::string to = testing::TempDir();
  std::filesystem::copy(from, to, std::filesystem::copy_options::recursive);
  auto config = nlohmann::json::parse(testing::ReadFile(from + "/config.json"));
  config[key] = value;
  std::ofstream(to + "/config.json") << config.dump();
  return to;
}

absl::Status LoadStatus(const std::string& path, const ModelOptions& options = {}) {
  const auto backend = Backend::Cpu({.threads = 1});
  auto checkpoint = Checkpoint::Open(path);
  if (!checkpoint.ok()) return checkpoint.status();
  return Model::Load(*std::move(checkpoint), *backend, options).status();
}

TEST(ModelLoad, NamesATensorWhoseShapeIsNotTheConfigs) {
  const absl::Status status = LoadStatus(WithConfig("intermediate_size", 48));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.layers.0.mlp."));
  EXPECT_THAT(std::string(status.message()), HasSubstr("40"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("48"));
}

TEST(ModelLoad, NamesATensorThatIsMissing) {
  const absl::Status status = LoadStatus(WithConfig("tie_word_embeddings", false));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("lm_head.weight"));
}

TEST(ModelLoad, RefusesCachesOfBlocksThatHeadsDoNotFill) {
  const absl::Status status = LoadStatus(testing::SourcePath("tests/golden/swa_hybrid_nope"),
                                         {.cache_dtype = DType::kQ8_0});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("head_dim is 8, "));
  EXPECT_THAT(std::string(status.message()), HasSubstr("a multiple of 32"));
}

TEST(ModelLoad, RefusesByNameWhatNoOpCan) {
  nlohmann::json types = {"linear_attention", "full_attention", "sliding_attention",
                          "full_attention"};
  const absl::Status status = LoadStatus(WithConfig("layer_types", types));
  EXPECT_FALSE(status.ok());
  EXPECT_THAT(std::string(status.message()), HasSubstr("recurrent mixer"));
}

}  // namespace
}  // namespace longspan
