// The closed form, the allocator and the gauges are one: over random models, page sizes and
// lengths.
#include <utility>

#include "engine/kv_cache.h"
#include "gtest/gtest.h"
#include "models/spec.h"
#include "tests/support/cache_case.h"

namespace longspan {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// bytes(L) = Σ_full ceil(L / P) pages + Σ_window min(ceil(L / P), ceil((W - 1) / P) + 1) pages, as
// design says it: layer by layer, pages rounded up to their unit per kind. An element takes some
// sixteenths of a byte.
int64_t PlainBytes(const std::vector<CacheLayer>& layers, int sixteenths, int page_tokens,
                   int64_t tokens) {
  int64_t full = 0, window = 0, widest = 0;
  for (const CacheLayer& layer : layers) {
    const int64_t per_token = 2 * layer.kv_heads * layer.head_dim * sixteenths / 16;
    (layer.window > 0 ? window : full) += per_token * page_tokens;
    widest = std::max<int64_t>(widest, layer.window);
  }
  const int64_t pages = CeilDiv(tokens, page_tokens);
  return pages * CeilDiv(full, 256) * 256 +
         std::min(pages, CeilDiv(widest - 1, page_tokens) + 1) * CeilDiv(window, 256) * 256;
}

TEST(ClosedForm, EqualsTheAllocatorAndTheGaugesToTheByte) {
  constexpr std::pair<DType, int> kTypes[] = {
      {DType::kF32, 64}, {DType::kBF16, 32}, {DType::kQ8_0, 17}};
  Random random(3);
  for (int round = 0; round < 300; ++round) {
    std::vector<CacheLayer> layers = RandomLayers(random, /*same_window=*/round % 2);
    const int page_tokens = Pick(random, 1, 20);
    const auto [dtype, sixteenths] = kTypes[Pick(random, 0, 2)];
    for (CacheLayer& layer : layers) layer.head_dim *= Info(dtype).block_elements;
    HostBackend backend;
    const auto cache =
        *KvCache::Create(backend, CacheSpec(layers), dtype, page_tokens, 1 << 20, 8, 1000);
    int64_t expected = 0;
    for (int s = 0; s < 8; ++s) {
      const int64_t tokens = Pick(random, 0, 1000);
      const int64_t bytes = PlainBytes(layers, sixteenths, page_tokens, tokens);
      ASSERT_EQ(DemandOf(cache->shape(), tokens).bytes, bytes);
      const SequenceId sequence = cache->Open();
      int64_t reached = 0;
      while (reached < tokens) {  // in chunks of any size
        const int64_t next = std::min<int64_t>(tokens, reached + Pick(random, 1, 200));
        if (!cache->Reserve(sequence, next)) break;
        cache->Commit(sequence, reached = next);
      }
      expected += PlainBytes(layers, sixteenths, page_tokens, reached);
      const CacheUsage usage = cache->Usage();
      ASSERT_EQ(usage.used_bytes, expected);
      ASSERT_EQ(usage.paged_pages_used * cache->shape().paged_page_bytes +
                    usage.ring_pages_used * cache->shape().ring_page_bytes,
                expected);
      ASSERT_TRUE(cache->CheckIntegrity().ok()) << cache->CheckIntegrity();
    }
    for (SequenceId s = 0; s < 8; ++s) cache->Close(s);
    ASSERT_EQ(cache->Usage().used_bytes, 0);
    ASSERT_EQ(cache->Usage().superblocks_free, cache->Usage().superblocks_total);
  }
}

TEST(ClosedForm, SaysThatASequenceFitsIfAndOnlyIfAnEmptyCacheTakesIt) {
  Random random(4);
  int fitted = 0, refused = 0;
  for (int round = 0; round < 500; ++round) {
    const std::vector<CacheLayer> layers = RandomLayers(random, /*same_window=*/true);
    HostBackend backend;
    auto cache = KvCache::Create(backend, CacheSpec(layers), DType::kBF16, Pick(random, 1, 20),
                                 Pick(random, 1, 40) * 1024, 2, 1000);
    if (!cache.ok()) continue;
    const int64_t tokens = Pick(random, 1, 1000);
    const bool fits = (*cache)->CouldEverFit(tokens);
    EXPECT_EQ((*cache)->Reserve((*cache)->Open(), tokens), fits);
    EXPECT_EQ((*cache)->Usage().used_bytes, fits ? DemandOf((*cache)->shape(), tokens).bytes : 0);
    ++(fits ? fitted : refused);
  }
  EXPECT_GT(fitted, 50);
  EXPECT_GT(refused, 50);
}

// The numbers are what the scheduler decides by, so they must hold however scattered the pages are.
TEST(ClosedForm, PredictsEveryReserveHoweverScatteredThePagesAre) {
  Random random(5);
  const std::vector<CacheLayer> layers = {{0, 1, 16}, {12, 1, 16}, {12, 2, 16}};
  HostBackend backend;
  auto cache = *KvCache::Create(backend, CacheSpec(layers), DType::kF32, 4, 64 * 1024, 32, 100000);
  const CacheNumbers& numbers = cache->numbers();
  std::vector<int64_t> tokens(32, 0);
  for (int s = 0; s < 32; ++s) cache->Open();
  int granted = 0, denied = 0;
  for (int i = 0; i < 20000; ++i) {
    const SequenceId s = Pick(random, 0, 31);
    if (Pick(random, 0, 9) == 0) {
      cache->Close(s);
      ASSERT_EQ(cache->Open(), s);
      tokens[s] = 0;
      continue;
    }
    const int64_t wanted = tokens[s] + Pick(random, 1, 24);
    CacheDemand demand = DemandOf(numbers.shape, wanted);
    for (int other = 0; other < 32; ++other) {
      if (other != s) demand += DemandOf(numbers.shape, tokens[other]);
    }
    const bool fits = numbers.Fits(demand);
    ASSERT_EQ(cache->Reserve(s, wanted), fits);
    ++(fits ? granted : denied);
    if (fits) cache->Commit(s, tokens[s] = wanted);
    if (i % 100 == 0) {
      ASSERT_TRUE(cache->CheckIntegrity().ok()) << cache->CheckIntegrity();
    }
  }
  EXPECT_GT(granted, 1000);
  EXPECT_GT(denied, 1000);
}

TEST(ClosedForm, BytesToHoldIsEnoughAndNotMuchMore) {
  Random random(6);
  for (int round = 0; round < 300; ++round) {
    const CacheShape shape = ShapeOf(CacheSpec(RandomLayers(random, /*same_window=*/false)),
                                     DType::kBF16, Pick(random, 1, 64));
    const int64_t tokens = Pick(random, 1, 2000000);
    const CacheDemand demand = DemandOf(shape, tokens);
    const CacheNumbers numbers = NumbersOf(shape, BytesToHold(shape, tokens));
    EXPECT_TRUE(numbers.Fits(demand));
    // 1/64 of each superblock may be waste, and each kind and the end may round up one.
    EXPECT_LE(numbers.bytes(), demand.bytes * 64 / 63 + 4 * numbers.superblock_bytes);
  }
}

// Gemma 3 27B, 131,072 tokens in bf16: 62 layers of which 52 have window 1024, 16 kv heads of 128.
// By hand: 8,192 bytes per token and layer (K or V 4,096 each); 10 full layers = 10 GiB; rings of
// 1,024 + 16 tokens in 52 layers = 422.5 MiB.
TEST(ClosedForm, GivesTheHandCountOfALargeHybrid) {
  std::vector<CacheLayer> layers;
  for (int i = 0; i < 62; ++i) layers.push_back({i % 6 == 5 ? 0 : 1024, 16, 128});
  const CacheShape shape = ShapeOf(CacheSpec(layers), DType::kBF16, 16);
  const CacheDemand demand = DemandOf(shape, 131072);
  EXPECT_EQ(demand.paged_pages, 8192);
  EXPECT_EQ(demand.ring_pages, 65);
  EXPECT_EQ(demand.bytes, int64_t{10} * 131072 * 8192 + int64_t{52} * 1040 * 8192);
}

TEST(ClosedForm, RefusesACacheThatHoldsNotOneTokenOfEachKind) {
  HostBackend backend;
  const ModelSpec spec = CacheSpec({{0, 8, 64}, {64, 8, 64}});
  const absl::Status status =
      KvCache::Create(backend, spec, DType::kBF16, 16, 32767, 1, 100).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(status.message().find("32767"), std::string::npos) << status;
}

TEST(ClosedForm, NamesASizeThatIsNotPositive) {
  HostBackend backend;
  const ModelSpec spec = CacheSpec({{0, 1, 8}});
  const absl::Status status = KvCache::Create(backend, spec, DType::kF32, 0, 9999, 1, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("page_tokens is 0"), std::string::npos) << status;
  EXPECT_FALSE(KvCache::Create(backend, spec, DType::kF32, 16, -1, 1, 1).ok());
  EXPECT_FALSE(KvCache::Create(backend, spec, DType::kF32, 16, 9999, 0, 1).ok());
  EXPECT_FALSE(KvCache::Create(backend, spec, DType::kF32, 16, 9999, 1, 0).ok());
}

TEST(ClosedForm, RefusesRecurrentLayersByName) {
  HostBackend backend;
  ModelSpec spec = CacheSpec({{0, 1, 8}, {0, 1, 8}});
  spec.layers[1].mixer = RecurrentSpec{.kind = "mamba2", .state_bytes = 64};
  const absl::Status status =
      KvCache::Create(backend, spec, DType::kF32, 16, 1 << 20, 1, 100).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("layer 1"), std::string::npos);
  EXPECT_NE(status.message().find("mamba2"), std::string::npos);
}

}  // namespace
}  // namespace longspan
