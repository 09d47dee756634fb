// Steps as the stager makes them of sequences, through the shipped model.
#include "engine/stager.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "tests/support/paths.h"
#include "tests/support/test_device.h"

namespace longspan {
namespace {

// All that a step gives: logits of each item, then its records.
struct Given {
  std::vector<float> logits;
  std::vector<SpanRecord> records;
};

class Steps {
 public:
  Steps()
      : backend_(testing::OpenTestDevice(0, "cpu")),
        loaded_(*LoadModel(testing::SourcePath("models/default"), *backend_, {})),
        model_(*loaded_.model),
        cache_(*KvCache::Create(*backend_, model_.spec(), model_.cache_dtype(), 16, 64 << 20, kMost,
                                1024)),
        stager_(*backend_, model_, kMost) {}

  StageItem Read(const std::vector<int32_t>& prompt) {
    StageItem item;
    item.cache = cache_->Open();
    item.tokens = absl::MakeConstSpan(prompt);
    CHECK(cache_->Reserve(item.cache, static_cast<int64_t>(prompt.size()) + 1));
    model_.Forward(stager_.Stage({item}, *cache_).step);
    cache_->Commit(item.cache, static_cast<int64_t>(prompt.size()));
    item.begin = static_cast<int64_t>(prompt.size());
    item.wants_logits = item.observe = true;
    return item;
  }

  // Of the first `count` items.
  Given Take(const std::vector<StageItem>& items, size_t count) {
    const StagedStep staged = stager_.Stage(items, *cache_);
    const View logits = model_.Forward(staged.step).Rows(static_cast<int64_t>(count));
    Given given;
    given.logits.resize(logits.elements());
    backend_->CopyOut(given.logits.data(), logits.data, logits.bytes());
    for (size_t i = 0; i < count; ++i) {
      const SpanRow row = stager_.Records(staged, staged.observed[i]);
      stager_.AwaitRecords();
      for (size_t l = 0; l < model_.spec().layers.size(); ++l) {
        const int heads = std::get<AttentionSpec>(model_.spec().layers[l].mixer).heads;
        const SpanRecord* records = row.Layer(static_cast<int>(l), heads);
        given.records.insert(given.records.end(), records, records + heads);
      }
    }
    return given;
  }
  const KvCache& cache() const { return *cache_; }

 private:
  static constexpr int kMost = 8;
  std::unique_ptr<Backend> backend_;
  LoadedModel loaded_;
  Model& model_;
  std::unique_ptr<KvCache> cache_;
  Stager stager_;
};

void ExpectSame(const Given& got, const Given& want) {
  EXPECT_EQ(got.logits, want.logits);
  ASSERT_EQ(got.records.size(), want.records.size());
  for (size_t i = 0; i < got.records.size(); ++i) {
    EXPECT_EQ(got.records[i].entropy, want.records[i].entropy) << i;
    EXPECT_EQ(got.records[i].distance, want.records[i].distance) << i;
    EXPECT_EQ(got.records[i].top_key, want.records[i].top_key) << i;
  }
}

TEST(Engine, RowsOfNoSequenceChangeNoBit) {
  Steps steps;
  const int32_t next = 7, none = 0;
  std::vector<StageItem> items;
  for (int length : {5, 300, 1}) {
    std::vector<int32_t> prompt(length);
    for (int i = 0; i < length; ++i) prompt[i] = 3 + (i * 31 + length) % 4000;
    items.push_back(steps.Read(prompt));
    items.back().tokens = absl::MakeConstSpan(&next, 1);
  }
  const Given alone = steps.Take(items, items.size());
  StageItem of_none;
  of_none.tokens = absl::MakeConstSpan(&none, 1);
  of_none.wants_logits = of_none.observe = true;
  std::vector<StageItem> filled = items;
  filled.resize(5, of_none);
  ExpectSame(steps.Take(filled, items.size()), alone);
  ExpectSame(steps.Take(items, items.size()), alone);  // their caches are what they were
  EXPECT_TRUE(steps.cache().CheckIntegrity().ok());
}

}  // namespace
}  // namespace longspan
