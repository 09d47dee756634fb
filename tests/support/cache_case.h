#pragma once
// Small architectures and a cache whose contents are traced, for tests of the caches.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "engine/kv_cache.h"
#include "gtest/gtest.h"
#include "tests/support/host_backend.h"

namespace longspan {

struct CacheLayer {
  int window = 0;  // 0: full attention
  int kv_heads = 1;
  int head_dim = 1;
};

inline ModelSpec CacheSpec(const std::vector<CacheLayer>& layers) {
  ModelSpec spec;
  for (const CacheLayer& layer : layers) {
    AttentionSpec attention;
    attention.heads = attention.kv_heads = layer.kv_heads;
    attention.head_dim = layer.head_dim;
    if (layer.window > 0) attention.window = layer.window;
    LayerSpec layer_spec;
    layer_spec.mixer = attention;
    spec.layers.push_back(layer_spec);
  }
  return spec;
}

using Random = std::mt19937;

inline int Pick(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

inline std::vector<CacheLayer> RandomLayers(Random& random, bool same_window) {
  std::vector<CacheLayer> layers(Pick(random, 1, 6));
  const int window = Pick(random, 1, 40);
  for (CacheLayer& layer : layers) {
    if (Pick(random, 0, 1)) layer.window = same_window ? window : Pick(random, 1, 40);
    layer.kv_heads = Pick(random, 1, 3);
    layer.head_dim = Pick(random, 1, 9);
  }
  return layers;
}

// Drives a KvCache of F32 as steps do and remembers what each sequence wrote. Before each step
// every position that a query of the step may see is read back through the layer's view.
class TracedCache {
 public:
  TracedCache(const std::vector<CacheLayer>& layers, int page_tokens, int64_t bytes,
              int max_sequences, int max_context)
      : layers_(layers),
        cache(*KvCache::Create(backend, CacheSpec(layers), DType::kF32, page_tokens, bytes,
                               max_sequences, max_context)) {}

  // False when the cache has no room; then nothing has changed.
  bool Step(SequenceId sequence, int count) {
    const int64_t begin = cache->committed(sequence), end = begin + count;
    const bool can = cache->CanReserve(sequence, end);
    EXPECT_EQ(cache->Reserve(sequence, end), can);
    if (!can) return false;
    std::vector<float>& stamps = written_[sequence];
    // All sequences in one order, as steps have them: rows of the table outlive a step.
    std::vector<SequenceId> sequences;
    for (const auto& [other, stamps_of_other] : written_) sequences.push_back(other);
    row_ = static_cast<int>(std::find(sequences.begin(), sequences.end(), sequence) -
                            sequences.begin());
    const KvView* views = cache->Views(sequences);
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      const int64_t window = layers_[layer].window > 0 ? layers_[layer].window : end;
      for (int64_t p = std::max<int64_t>(0, begin - window + 1); p < begin; ++p) {
        ForEachRow(views[layer], p, [&](float* row, int which) {
          EXPECT_EQ(*row, stamps[p] + static_cast<float>(which))
              << "layer " << layer << " at " << p;
        });
      }
    }
    for (int64_t p = begin; p < end; ++p) stamps.push_back(static_cast<float>(next_stamp_ += 64));
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
      const int64_t window = layers_[layer].window > 0 ? layers_[layer].window : end;
      for (int64_t p = std::max(begin, end - window); p < end; ++p) {
        ForEachRow(views[layer], p,
                   [&](float* row, int which) { *row = stamps[p] + static_cast<float>(which); });
      }
    }
    cache->Commit(sequence, end);
    return true;
  }

  SequenceId Fork(SequenceId parent) {
    const SequenceId child = cache->Fork(parent);
    if (child >= 0) written_[child] = written_[parent];
    return child;
  }

  void Close(SequenceId sequence) {
    cache->Close(sequence);
    written_.erase(sequence);
  }

 private:
  // Calls with the first element of each key and value row of the position.
  template <class F>
  void ForEachRow(const KvView& view, int64_t position, F f) const {
    std::byte* page = view.Page(row_, position);
    const int64_t row = position % view.page_tokens;
    for (int head = 0; head < view.kv_heads; ++head) {
      const int64_t at = (head * view.page_tokens + row) * view.head_dim * 4;
      f(reinterpret_cast<float*>(page + view.key_offset + at), 2 * head);
      f(reinterpret_cast<float*>(page + view.value_offset + at), 2 * head + 1);
    }
  }

  std::vector<CacheLayer> layers_;
  int row_ = 0;  // of the step's sequence
  std::map<SequenceId, std::vector<float>> written_;
  int64_t next_stamp_ = 0;  // kept below 2^24 by the tests, so that floats are exact

 public:
  HostBackend backend;
  std::unique_ptr<KvCache> cache;
};

}  // namespace longspan
