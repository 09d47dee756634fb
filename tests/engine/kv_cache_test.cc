#include "engine/kv_cache.h"

#include <atomic>
#include <functional>
#include <thread>

#include "gtest/gtest.h"
#include "tests/support/cache_case.h"
#include "tests/support/cache_test_peer.h"

namespace longspan {
namespace {

using Peer = CacheTestPeer;

TEST(KvCache, EverySequenceReadsWhatItWroteThroughForksAndCompaction) {
  Random random(7);
  size_t copied = 0;
  for (int round = 0; round < 60; ++round) {
    const std::vector<CacheLayer> layers = RandomLayers(random, /*same_window=*/round % 3 == 0);
    const int page_tokens = Pick(random, 1, 9);
    const int64_t bytes =
        BytesToHold(ShapeOf(CacheSpec(layers), DType::kF32, page_tokens), 200) * Pick(random, 1, 3);
    TracedCache traced(layers, page_tokens, bytes, 6, 200);
    std::vector<SequenceId> open;
    for (int i = 0; i < 200; ++i) {
      const int action = Pick(random, 0, 19);
      const size_t any = open.empty() ? 0 : Pick(random, 0, static_cast<int>(open.size()) - 1);
      if (action == 0 || open.empty()) {
        const SequenceId opened = traced.cache->Open();
        EXPECT_EQ(opened < 0, open.size() == 6u);
        if (opened >= 0) open.push_back(opened);
      } else if (action <= 2) {
        const SequenceId child = traced.Fork(open[any]);
        EXPECT_EQ(child < 0, open.size() == 6u);
        if (child >= 0) open.push_back(child);
      } else if (action == 3 || traced.cache->committed(open[any]) > 140) {
        traced.Close(open[any]);
        open.erase(open.begin() + any);
      } else {
        traced.Step(open[any], action < 10 ? 1 : Pick(random, 1, 60));
      }
      ASSERT_TRUE(traced.cache->CheckIntegrity().ok()) << traced.cache->CheckIntegrity();
      if (::testing::Test::HasFailure()) return;
    }
    for (SequenceId s : open) traced.Close(s);
    EXPECT_EQ(traced.cache->Usage().used_bytes, 0);
    copied += traced.backend.copied_within;
  }
  EXPECT_GT(copied, 0u);
}

TEST(KvCache, ReserveTakesAllKindsOrNone) {
  // Two superblocks: pages of 4 tokens are 2,048 bytes full and 2,048 bytes window.
  TracedCache traced({{0, 1, 64}, {5, 1, 64}}, 4, 4 * 2048, 3, 100);
  KvCache& cache = *traced.cache;
  const SequenceId a = cache.Open(), b = cache.Open();
  ASSERT_TRUE(cache.Reserve(a, 4));  // one page of each kind; two are free
  ASSERT_TRUE(cache.Reserve(b, 4));
  const CacheUsage before = cache.Usage();
  EXPECT_EQ(before.paged_pages_total, 4) << "what an empty cache holds, whatever is used";
  EXPECT_FALSE(cache.CanReserve(a, 5));
  EXPECT_FALSE(cache.Reserve(a, 5));
  EXPECT_EQ(cache.Usage().used_bytes, before.used_bytes);
  EXPECT_EQ(cache.Usage().superblocks_free, before.superblocks_free);
  EXPECT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
  cache.Close(b);
  EXPECT_TRUE(cache.Reserve(a, 5));
}

TEST(KvCache, AForkSharesEveryPageAndCopiesOnlyWhatItWrites) {
  TracedCache traced({{0, 1, 64}, {8, 1, 64}}, 4, 1 << 20, 4, 100);
  KvCache& cache = *traced.cache;
  const SequenceId parent = cache.Open();
  ASSERT_TRUE(traced.Step(parent, 18));  // 5 full pages, 3 ring pages, the last half full
  const CacheUsage alone = cache.Usage();
  const SequenceId child = traced.Fork(parent);
  EXPECT_EQ(cache.committed(child), 18);
  EXPECT_EQ(cache.Usage().used_bytes, alone.used_bytes);
  EXPECT_EQ(cache.Usage().sequences, 2);
  ASSERT_TRUE(traced.Step(child, 1));  // the last page of each kind becomes its own
  EXPECT_EQ(cache.Usage().paged_pages_used, alone.paged_pages_used + 1);
  EXPECT_EQ(cache.Usage().ring_pages_used, alone.ring_pages_used + 1);
  EXPECT_EQ(traced.backend.copied_within, 2u * 4 * 64 * 2 * 4);
  ASSERT_TRUE(traced.Step(parent, 1));  // the parent's are now its own: nothing to copy
  EXPECT_EQ(traced.backend.copied_within, 2u * 4 * 64 * 2 * 4);
  traced.Close(parent);
  ASSERT_TRUE(traced.Step(child, 30));
  EXPECT_TRUE(cache.CheckIntegrity().ok()) << cache.CheckIntegrity();
}

TEST(KvCache, OpensNoMoreThanMaxSequencesAndReusesThem) {
  TracedCache traced({{0, 1, 8}}, 4, 1 << 20, 2, 100);
  const SequenceId a = traced.cache->Open(), b = traced.cache->Open();
  EXPECT_NE(a, b);
  EXPECT_EQ(traced.cache->Open(), -1);
  EXPECT_EQ(traced.cache->Fork(a), -1);
  traced.cache->Close(a);
  EXPECT_EQ(traced.cache->Open(), a);
}

TEST(KvCache, LayersThatReadAnothersCacheTakeNoRoomAndSeeThatCache) {
  ModelSpec spec = CacheSpec({{0, 2, 8}, {0, 2, 8}, {16, 2, 8}});
  const CacheShape own = ShapeOf(spec, DType::kBF16, 16);
  spec.layers[1].cache_of = 0;
  const CacheShape shared = ShapeOf(spec, DType::kBF16, 16);
  EXPECT_EQ(shared.paged_page_bytes * 2, own.paged_page_bytes);
  HostBackend backend;
  const auto cache = *KvCache::Create(backend, spec, DType::kBF16, 16, 1 << 20, 1, 100);
  const KvView* views = cache->Views({cache->Open()});
  EXPECT_EQ(views[1].key_offset, views[0].key_offset);
  EXPECT_EQ(views[1].table, views[0].table);
  EXPECT_NE(views[2].table, views[0].table);
}

TEST(KvCache, ViewsFollowTheOrderOfTheStep) {
  TracedCache traced({{0, 1, 64}, {5, 1, 64}}, 4, 1 << 20, 3, 100);
  KvCache& cache = *traced.cache;
  const SequenceId a = cache.Open(), b = cache.Open();
  ASSERT_TRUE(cache.Reserve(a, 30));
  ASSERT_TRUE(cache.Reserve(b, 9));
  const KvView* views = cache.Views({a, b});
  const std::byte *a20 = views[0].Page(0, 20), *b8 = views[0].Page(1, 8),
                  *ring_a20 = views[1].Page(0, 20);
  EXPECT_NE(a20, b8);
  EXPECT_EQ(ring_a20, views[1].Page(0, 20 - 4 * views[1].slots));
  views = cache.Views({b, a});
  EXPECT_EQ(views[0].Page(1, 20), a20);
  EXPECT_EQ(views[0].Page(0, 8), b8);
  EXPECT_EQ(views[1].Page(1, 20), ring_a20);
}

TEST(KvCache, UsageCanBeReadFromAnyThreadWhileTheEngineWorks) {
  TracedCache traced({{0, 1, 16}, {5, 1, 16}}, 4, 1 << 16, 4, 200);
  std::atomic<bool> done{false};
  std::thread reader([&] {
    while (!done) {
      const CacheUsage usage = traced.cache->Usage();
      // One consistent copy: the bytes are those of the pages.
      ASSERT_EQ(usage.used_bytes,
                usage.paged_pages_used * traced.cache->shape().paged_page_bytes +
                    usage.ring_pages_used * traced.cache->shape().ring_page_bytes);
    }
  });
  for (int i = 0; i < 200; ++i) {
    const SequenceId s = traced.cache->Open();
    traced.Step(s, 1 + i % 100);
    traced.Close(s);
  }
  done = true;
  reader.join();
}

struct Damage {
  const char* name;
  std::function<void(KvCache&, SequenceId)> inflict;
  const char* seen;  // in the message
};

class KvCacheIntegrity : public ::testing::TestWithParam<Damage> {};

TEST_P(KvCacheIntegrity, SeesTheDamage) {
  HostBackend backend;
  const auto cache = *KvCache::Create(backend, CacheSpec({{0, 1, 16}, {9, 1, 16}}), DType::kF32, 4,
                                      1 << 20, 4, 100);
  const SequenceId sequence = cache->Open();
  ASSERT_TRUE(cache->Reserve(sequence, 30));
  cache->Commit(sequence, 30);
  cache->Fork(sequence);
  ASSERT_TRUE(cache->CheckIntegrity().ok());
  GetParam().inflict(*cache, sequence);
  const absl::Status status = cache->CheckIntegrity();
  ASSERT_FALSE(status.ok());
  EXPECT_NE(status.message().find(GetParam().seen), std::string::npos) << status;
}

INSTANTIATE_TEST_SUITE_P(
    Each, KvCacheIntegrity,
    ::testing::Values(
        Damage{"PageFreedWhileInUse",
               [](KvCache& cache, SequenceId s) {
                 Peer::ListAsFree(Peer::pool(Peer::paged(cache)), Peer::paged(cache).pages(s)[2]);
               },
               "2 references and is free"},
        Damage{"PageFreedTwice",
               [](KvCache& cache, SequenceId s) {
                 PagePool& pool = Peer::pool(Peer::ring(cache));
                 Peer::ListAsFree(pool, Peer::ring(cache).pages(s)[0]);
                 Peer::ListAsFree(pool, Peer::ring(cache).pages(s)[0]);
               },
               "free twice"},
        Damage{"FreePageLost",
               [](KvCache& cache, SequenceId s) {
                 Peer::LoseFreePageBeside(Peer::pool(Peer::ring(cache)),
                                          Peer::ring(cache).pages(s)[0]);
               },
               "0 references and is not free"},
        Damage{"PageInUseLost",
               [](KvCache& cache, SequenceId s) { Peer::pages(Peer::paged(cache), s).pop_back(); },
               "stands in 1 tables with 2 references"},
        Damage{"ReferenceTooMany",
               [](KvCache& cache, SequenceId s) {
                 Peer::AddReferences(Peer::pool(Peer::ring(cache)), Peer::ring(cache).pages(s)[1],
                                     1);
               },
               "stands in 2 tables with 3 references"},
        Damage{"ReferenceTooFew",
               [](KvCache& cache, SequenceId s) {
                 Peer::AddReferences(Peer::pool(Peer::ring(cache)), Peer::ring(cache).pages(s)[1],
                                     -1);
               },
               "stands in 2 tables with 1 references"},
        Damage{"PageInTwoTablesUnreferenced",
               [](KvCache& cache, SequenceId s) {
                 Peer::pages(Peer::paged(cache), s)[0] = Peer::pages(Peer::paged(cache), s)[1];
               },
               "references"},
        Damage{"PageOfTheOtherKind",
               [](KvCache& cache, SequenceId s) {
                 Peer::pages(Peer::paged(cache), s)[0] = Peer::pages(Peer::ring(cache), s)[0];
               },
               "references"},
        Damage{"UsedCountWrong",
               [](KvCache& cache, SequenceId) {
                 PagePool& pool = Peer::pool(Peer::paged(cache));
                 Peer::SetUsed(pool, pool.used() + 1);
               },
               "the pool says"},
        Damage{"SuperblockLost",
               [](KvCache& cache, SequenceId) { Peer::LoseFreeSuperblock(Peer::arena(cache)); },
               "free superblocks are not the arena's"},
        Damage{"LeasedSuperblockListedFree",
               [](KvCache& cache, SequenceId) { Peer::ListAsFree(Peer::arena(cache), 0); },
               "superblock 0 is free and leased"},
        Damage{"SuperblockOfNobody", [](KvCache& cache, SequenceId) { Peer::arena(cache).Lease(); },
               "has 0 owners"},
        Damage{"SequenceLost", [](KvCache& cache, SequenceId s) { Peer::open(cache, s) = false; },
               "is lost"},
        Damage{"MoreRoomThanPages",
               [](KvCache& cache, SequenceId s) { Peer::reserved(cache, s) = 40; },
               "room for 40 and 8 pages instead of 10"},
        Damage{"GaugeWrong", [](KvCache& cache, SequenceId) { Peer::SetUsedBytesGauge(cache, 1); },
               "the gauges say 1"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace longspan
