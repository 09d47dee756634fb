// Shapes without weights: what is made from a config.json alone, and the shapes that are shipped.
#include "models/random_checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <set>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "models/family.h"
#include "models/model.h"
#include "tests/support/full_op_table.h"
#include "tests/support/golden.h"
#include "tests/support/model_runner.h"
#include "tests/support/paths.h"
#include "tests/support/weights.h"

namespace longspan {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;
using testing::ModelRunner;

const char* const kShapes[] = {"gemma3-4b", "gemma3-27b", "gpt-oss-20b-attention"};

std::string ShapeFile(const std::string& name) {
  return testing::SourcePath("models/shapes/" + name + ".json");
}

ModelSpec ShippedSpec(const std::string& name) {
  auto spec = ReadSpecAt(ShapeFile(name));
  EXPECT_TRUE(spec.ok()) << spec.status();
  return spec.ok() ? *std::move(spec) : ModelSpec();
}

std::string Written(const std::string& text) {
  const std::string path = testing::TempDir() + "/config.json";
  std::ofstream(path) << text;
  return path;
}

// A shipped shape with other sizes.
std::string Reduced(const std::string& name, const nlohmann::json& changes) {
  auto config = nlohmann::json::parse(testing::ReadFile(ShapeFile(name)));
  config.merge_patch(changes);
  return Written(config.dump());
}

// Small, but of the family's layers: one full layer at least.
std::string Small(const std::string& name) {
  const int layers = name == "gpt-oss-20b-attention" ? 2 : 6;
  nlohmann::json changes = {{"vocab_size", 500},        {"hidden_size", 256},
                            {"intermediate_size", 512}, {"num_hidden_layers", layers},
                            {"sliding_window", 16},     {"num_attention_heads", 8},
                            {"num_key_value_heads", 4}, {"head_dim", 64}};
  if (layers == 2) changes["layer_types"] = {"sliding_attention", "full_attention"};
  return Reduced(name, changes);
}

std::unique_ptr<Checkpoint> Make(const std::string& config, const RandomWeights& weights = {}) {
  auto checkpoint = MakeRandomCheckpoint(config, weights);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.status();
  return checkpoint.ok() ? *std::move(checkpoint) : nullptr;
}

std::string Error(const std::string& config, const RandomWeights& weights = {}) {
  return std::string(MakeRandomCheckpoint(config, weights).status().message());
}

constexpr DType kTypes[] = {DType::kBF16, DType::kQ8_0, DType::kQ4_K};

TEST(RandomCheckpoint, HasATensorForEverySlotAndNoOther) {
  for (const char* name : kShapes) {
    const auto checkpoint = Make(Small(name));
    const auto spec = ReadSpec(*checkpoint);
    ASSERT_TRUE(spec.ok()) << spec.status();
    const std::vector<Slot> slots = SlotsOf(*spec, checkpoint->format());
    EXPECT_EQ(slots.size(), checkpoint->tensors().size());
    int64_t parameters = 0;
    for (const Slot& slot : slots) {
      const auto tensor = FindSlot(*checkpoint, slot);
      ASSERT_TRUE(tensor.ok()) << tensor.status();
      const int64_t elements = std::accumulate(slot.shape.begin(), slot.shape.end(), int64_t{1},
                                               std::multiplies<int64_t>());
      EXPECT_EQ((*tensor)->data.size(), BytesOf((*tensor)->dtype, elements));
      parameters += elements;
    }
    EXPECT_EQ(parameters, spec->parameters());
  }
}

TEST(RandomCheckpoint, TheSameSeedGivesTheSameBytesOverlappingOrNot) {
  const std::string config = Small("gemma3-4b");
  for (const DType type : kTypes) {
    const auto one = Make(config, {.matrices = type, .seed = 7});
    const auto two = Make(config, {.matrices = type, .seed = 7, .overlapping = true});
    const auto other = Make(config, {.matrices = type, .seed = 8});
    for (const auto& [name, tensor] : one->tensors()) {
      EXPECT_TRUE(tensor.data == two->Find(name)->data) << Info(type).name << " " << name;
      EXPECT_FALSE(tensor.data == other->Find(name)->data) << Info(type).name << " " << name;
    }
  }
}

TEST(RandomCheckpoint, OverlappingTakesMemoryForTheLargestMatrixOnly) {
  const auto apart = Make(Small("gemma3-4b"));
  const auto over = Make(Small("gemma3-4b"), {.overlapping = true});
  // From the first byte of any matrix to the last.
  const auto extent = [](const Checkpoint& checkpoint) {
    const std::byte *low = nullptr, *high = nullptr;
    for (const auto& [name, tensor] : checkpoint.tensors()) {
      if (tensor.shape.size() != 2) continue;
      const std::byte* end = tensor.data.data() + tensor.data.size();
      low = low == nullptr ? tensor.data.data() : std::min(low, tensor.data.data());
      high = std::max(high, end);
    }
    return high - low;
  };
  EXPECT_LE(extent(*over), 2 * (512 * 256 + 1'000'003));
  EXPECT_GE(extent(*apart), 2 * (500 * 256 + 6 * (2 * 256 * 512 + 2 * 256 * 256 + 3 * 256 * 512)));
}

TEST(RandomCheckpoint, NoTwoTensorsAndNoTwoRowsAreEqual) {
  const auto checkpoint = Make(Small("gemma3-4b"));
  std::set<std::string_view> rows;
  size_t count = 0;
  for (const auto& [name, tensor] : checkpoint->tensors()) {
    const size_t row = tensor.data.size() / (tensor.shape.size() == 2 ? tensor.shape[0] : 1);
    for (size_t at = 0; at < tensor.data.size(); at += row, ++count) {
      rows.emplace(reinterpret_cast<const char*>(tensor.data.data()) + at, row);
    }
  }
  EXPECT_EQ(rows.size(), count);
}

TEST(RandomCheckpoint, MatricesHaveMeanZeroAndDeviationTwoHundredths) {
  for (const DType type : kTypes) {
    const auto checkpoint = Make(Small("gemma3-4b"), {.matrices = type});
    const TensorInfo& tensor = *checkpoint->Find("model.layers.0.mlp.down_proj.weight");
    ASSERT_EQ(tensor.dtype, type);
    const auto* bytes = reinterpret_cast<const uint8_t*>(tensor.data.data());
    const int64_t rows = tensor.shape[0], columns = tensor.shape[1];
    double sum = 0, squares = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        const double value = testing::DecodeElement(type, bytes + r * BytesOf(type, columns), c);
        sum += value;
        squares += value * value;
      }
    }
    const double n = static_cast<double>(rows * columns);  // 131,072: 0.02 / sqrt(n) is 5.5e-5
    EXPECT_NEAR(sum / n, 0, 3e-4) << Info(type).name;
    EXPECT_NEAR(std::sqrt(squares / n), 0.02, 0.001) << Info(type).name;
  }
}

TEST(RandomCheckpoint, NormsMultiplyByAboutOne) {
  for (const char* name : kShapes) {
    const bool plus_one = std::string(name) != "gpt-oss-20b-attention";
    const auto checkpoint = Make(Small(name));
    for (const auto& [tensor_name, tensor] : checkpoint->tensors()) {
      if (tensor.shape.size() != 1) continue;
      const auto* values = reinterpret_cast<const float*>(tensor.data.data());
      EXPECT_THAT(std::vector<float>(values, values + tensor.shape[0]),
                  Each(::testing::FloatNear(plus_one ? 0 : 1, 0.1f)))
          << tensor_name;
    }
  }
}

TEST(RandomCheckpoint, LogitsAreFiniteAndNotAllTheSame) {
  const auto backend = Backend::Cpu({.threads = 2});
  std::vector<int32_t> tokens(40);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7919 % 500);
  for (const char* name : kShapes) {
    for (const DType type : kTypes) {
      auto model = Model::Load(Make(Small(name), {.matrices = type}), *backend, {});
      ASSERT_TRUE(model.ok()) << model.status();
      ModelRunner runner(*backend, **model, 1, 64);
      const std::vector<float> logits = runner.Feed(0, tokens, 16);
      ASSERT_EQ(logits.size(), 40u * 500);
      EXPECT_TRUE(
          std::all_of(logits.begin(), logits.end(), [](float x) { return std::isfinite(x); }))
          << name << " " << Info(type).name;
      const auto [least, most] = std::minmax_element(logits.begin(), logits.end());
      EXPECT_GT(*most - *least, 0.1f) << name << " " << Info(type).name;
      EXPECT_LT(*most - *least, 100.0f) << name << " " << Info(type).name;
    }
  }
}

TEST(LoadRandomModel, BringsATokenizerThatKnowsNoText) {
  const auto backend = Backend::Cpu({.threads = 1});
  const auto loaded = LoadRandomModel(Small("gemma3-4b"), DType::kBF16, *backend, {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->tokenizer->Decode({3, 499}, /*skip_special=*/false), "");
  EXPECT_TRUE(loaded->tokenizer->eos().empty());
  EXPECT_EQ(loaded->model->spec().vocab, 500);
}

// Memory of its own, of which so much is free.
class DeviceBackend : public Backend {
 public:
  explicit DeviceBackend(int64_t free)
      : Backend("device", nullptr, testing::FullOpTable(), /*host_memory=*/false), free_(free) {}
  Buffer Allocate(size_t bytes) override {
    return Buffer(std::calloc(bytes, 1), bytes, [](void* data, size_t) { std::free(data); });
  }
  int64_t FreeBytes() const override { return free_; }
  void CopyIn(void* to, const void* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
    copied_in += bytes;
  }
  void CopyOut(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void CopyWithin(void* to, const void* from, size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  Roofline MeasureRoofline() override { return {}; }

  int64_t copied_in = 0;

 private:
  int64_t free_;
};

TEST(LoadRandomModel, ADeviceMustHoldEveryTensorThoughTheHostHoldsThemOverlapping) {
  const std::string config = Small("gemma3-4b");
  const auto checkpoint = Make(config);
  int64_t bytes = 0;
  for (const auto& [name, tensor] : checkpoint->tensors()) {
    bytes += static_cast<int64_t>(tensor.data.size());
  }
  DeviceBackend small(bytes - 1), large(bytes);
  const auto refused = LoadRandomModel(config, DType::kBF16, small, {});
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(refused.status().message()),
              AllOf(HasSubstr(absl::StrCat("weights are ", bytes, " bytes")),
                    HasSubstr(absl::StrCat(bytes - 1, " bytes free"))));
  const auto loaded = LoadRandomModel(config, DType::kBF16, large, {});
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->model->weight_bytes(), bytes);
  EXPECT_GE(large.copied_in, bytes);
}

TEST(LoadRandomModel, RefusesByNameWhatNoOpCan) {
  const auto backend = Backend::Cpu({.threads = 1});
  const auto loaded = LoadRandomModel(Reduced("gpt-oss-20b-attention", {{"model_type", "gpt_oss"}}),
                                      DType::kBF16, *backend, {});
  EXPECT_EQ(loaded.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(loaded.status().message()),
              AllOf(HasSubstr("attention sinks"), HasSubstr("MXFP4 experts")));
}

TEST(RandomCheckpoint, RefusesHostileConfigsAsRealOnesAreRefused) {
  EXPECT_THAT(Error("/nowhere/config.json"), HasSubstr("/nowhere/config.json"));
  EXPECT_THAT(Error(Written("[]")), HasSubstr("config.json"));
  EXPECT_THAT(Error(Written(std::string(1 << 20, '['))), HasSubstr("config.json"));
  EXPECT_THAT(Error(Written(std::string((4 << 20) + 1, ' '))), HasSubstr("4194304"));
  EXPECT_THAT(Error(Reduced("gemma3-4b", {{"model_type", "nonsense"}})), HasSubstr("nonsense"));
  EXPECT_THAT(Error(Reduced("gpt-oss-20b-attention", {{"hidden_size", nullptr}})),
              HasSubstr("hidden_size"));
  EXPECT_THAT(Error(Reduced("gemma3-4b", {{"hidden_size", -1}})), HasSubstr("hidden_size"));
  EXPECT_THAT(Error(Reduced("gemma3-4b", {{"num_hidden_layers", 1e18}})),
              HasSubstr("num_hidden_layers"));
}

TEST(RandomCheckpoint, RefusesBlocksThatDoNotFillARow) {
  EXPECT_THAT(Error(ShapeFile("gpt-oss-20b-attention"), {.matrices = DType::kQ4_K}),
              AllOf(HasSubstr("model.embed_tokens.weight"), HasSubstr("2880"), HasSubstr("256")));
}

TEST(RandomCheckpoint, SaysHowMuchMemoryItNeedsAndHowMuchThereIs) {
  const auto config = Reduced(
      "gemma3-4b", {{"hidden_size", 1 << 20}, {"intermediate_size", 1 << 20}, {"head_dim", 64}});
  const auto status = MakeRandomCheckpoint(config, {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  // Two bytes for each number of the matrices, all of whole pages here.
  const int64_t bytes = 2 * (int64_t{262208} + 34 * (3 * (1 << 20) + 2 * (8 + 4) * 64)) << 20;
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr(absl::StrCat("need ", bytes, " bytes")), HasSubstr("are available")));
  // On the host an overlapping one needs the largest matrix and a run of numbers, to a page.
  const int64_t largest = int64_t{2} << 40, run = 2 * 1'000'003;
  EXPECT_THAT(Error(config, {.overlapping = true}),
              HasSubstr(absl::StrCat((largest + run + 4095) / 4096 * 4096)));
}

TEST(RandomCheckpoint, RefusesSizesThatOverflow) {
  // 4 matrices of 2^31 by 2^20 numbers of two bytes in each of 1,024 layers: 2^64 bytes.
  const auto config = Reduced("gemma3-4b", {{"hidden_size", 1 << 20},
                                            {"num_hidden_layers", 1024},
                                            {"num_attention_heads", 65535},
                                            {"num_key_value_heads", 65535},
                                            {"head_dim", 32768}});
  for (const bool overlapping : {false, true}) {
    EXPECT_THAT(Error(config, {.overlapping = overlapping}), HasSubstr("overflow"));
  }
}

// --- The shipped shapes, by arithmetic from the published sizes ---

// Embedding table; per layer q, o, k and v, the MLP, four norms and two of the heads; a last norm.
int64_t Gemma3Parameters(int64_t dim, int64_t layers, int64_t q, int64_t kv, int64_t mlp,
                         int64_t head) {
  return 262208 * dim + layers * (2 * dim * q + 2 * dim * kv + 3 * dim * mlp + 4 * dim + 2 * head) +
         dim;
}

TEST(Shapes, HaveThePublishedNumbersOfParameters) {
  const int64_t gemma_4b = ShippedSpec("gemma3-4b").parameters();
  EXPECT_EQ(gemma_4b, Gemma3Parameters(2560, 34, 8 * 256, 4 * 256, 10240, 256));
  EXPECT_EQ(gemma_4b, 3'880'263'168);
  const int64_t gemma_27b = ShippedSpec("gemma3-27b").parameters();
  EXPECT_EQ(gemma_27b, Gemma3Parameters(5376, 62, 32 * 128, 16 * 128, 21504, 128));
  // The Gemma 3 report (arXiv 2503.19786), table 1: non-embedding parameters in millions.
  EXPECT_EQ(std::llround((gemma_4b - 262208 * 2560.0) / 1e6), 3209);
  EXPECT_EQ(std::llround((gemma_27b - 262208 * 5376.0) / 1e6), 25600);
  // Two tables, since it ties nothing; two norms a layer, none of the heads.
  EXPECT_EQ(ShippedSpec("gpt-oss-20b-attention").parameters(),
            2 * 201088 * 2880LL +
                24 * (2 * 2880 * 4096LL + 2 * 2880 * 512 + 3 * 2880 * 2880 + 2 * 2880) + 2880);
}

TEST(Shapes, HaveThePublishedLayersWindowsAndCaches) {
  const struct {
    const char* name;
    int layers, full_every, window;
    int64_t bytes_per_token;  // of one layer: keys and values of all heads, two bytes each
    double scale;             // of the logits, to the power of -2
  } kPublished[] = {{"gemma3-4b", 34, 6, 1024, 2 * 4 * 256 * 2, 256},
                    {"gemma3-27b", 62, 6, 1024, 2 * 16 * 128 * 2, 168},
                    {"gpt-oss-20b-attention", 24, 2, 128, 2 * 8 * 64 * 2, 64}};
  for (const auto& shape : kPublished) {
    const ModelSpec spec = ShippedSpec(shape.name);
    EXPECT_EQ(spec.name, shape.name);
    EXPECT_EQ(spec.max_context, 131072);
    ASSERT_EQ(static_cast<int>(spec.layers.size()), shape.layers);
    for (int i = 0; i < shape.layers; ++i) {
      const auto& a = std::get<AttentionSpec>(spec.layers[i].mixer);
      const bool full = i % shape.full_every == shape.full_every - 1;
      EXPECT_EQ(a.window, full ? std::nullopt : std::optional<int>(shape.window)) << i;
      EXPECT_NEAR(a.scale, 1 / std::sqrt(shape.scale), 1e-7);
      const CacheNeed need = NeedOf(a, DType::kBF16);
      EXPECT_EQ(need.kind, full ? CacheKind::kPaged : CacheKind::kRing);
      EXPECT_EQ(need.bytes_per_token, shape.bytes_per_token);
    }
  }
  const ModelSpec gemma = ShippedSpec("gemma3-4b");
  const RopeSpec& local = *std::get<AttentionSpec>(gemma.layers[0].mixer).rope;
  const RopeSpec& global = *std::get<AttentionSpec>(gemma.layers[5].mixer).rope;
  EXPECT_EQ(local.theta, 1e4);
  EXPECT_EQ(local.factor, 1);
  EXPECT_EQ(global.theta, 1e6);
  EXPECT_EQ(global.factor, 8);
}

TEST(Shapes, EachOneThatIsShippedIsTestedHere) {
  std::set<std::string> names;
  for (const auto& entry :
       std::filesystem::directory_iterator(testing::SourcePath("models/shapes"))) {
    if (entry.path().extension() == ".json") names.insert(entry.path().stem());
  }
  EXPECT_EQ(names, std::set<std::string>(std::begin(kShapes), std::end(kShapes)));
}

}  // namespace
}  // namespace longspan
