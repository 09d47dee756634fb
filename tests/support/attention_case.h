#pragma once
// A random attention problem with its cache, and a plain double-precision answer to it: every score
// is kept, softmax is taken over the whole row.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"
#include "tests/support/weights.h"

namespace longspan::testing {

struct AttentionShape {
  int heads = 4, kv_heads = 2, dim = 16, window = 0, page_tokens = 16;
  float softcap = 0;
  bool sinks = false;
  DType dtype = DType::kBF16;
  int far_window = 8;
  DType out = DType::kF32;  // BF16: answers are read back as floats
  float growth = 0;         // keys of position t are 1 + growth * t times as large
};

// Sequences of given lengths; all queries, keys and values are known, as if computed in one pass.
class AttentionCase {
 public:
  AttentionCase(const AttentionShape& shape, std::vector<int> lengths, uint32_t seed = 1)
      : shape_(shape), lengths_(std::move(lengths)) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<float>& v, size_t n, float scale) {
      v.resize(n);
      for (float& x : v) x = scale * normal(random);
    };
    q_.resize(lengths_.size());
    k_ = v_ = q_;
    for (size_t s = 0; s < lengths_.size(); ++s) {
      fill(q_[s], static_cast<size_t>(lengths_[s]) * shape.heads * shape.dim, 1.5f);
      fill(k_[s], static_cast<size_t>(lengths_[s]) * shape.kv_heads * shape.dim, 1.0f);
      fill(v_[s], static_cast<size_t>(lengths_[s]) * shape.kv_heads * shape.dim, 1.0f);
      for (size_t i = 0; i < k_[s].size(); ++i) {
        k_[s][i] *= 1 + shape.growth * static_cast<float>(i / (shape.kv_heads * shape.dim));
      }
      for (auto* rows : {&k_[s], &v_[s]}) {  // as the cache has them
        const std::vector<uint8_t> bytes = Encode(shape.dtype, *rows);
        for (size_t i = 0; i < rows->size(); ++i) {
          (*rows)[i] = static_cast<float>(DecodeElement(shape.dtype, bytes.data(), i));
        }
      }
    }
    if (shape.sinks) fill(sinks_, shape.heads, 1.0f);
    Rewind();
  }

  // Empties the cache.
  void Rewind() {
    const int64_t layer = static_cast<int64_t>(shape_.kv_heads) * shape_.page_tokens * shape_.dim;
    const int64_t page_bytes =
        (2 * BytesOf(shape_.dtype, layer) + kPageUnitBytes - 1) / kPageUnitBytes * kPageUnitBytes;
    int longest = 1;
    for (int n : lengths_) longest = std::max(longest, n);
    slots_ = shape_.window > 0
                 ? (shape_.window - 1 + shape_.page_tokens - 1) / shape_.page_tokens + 1
                 : (longest + shape_.page_tokens - 1) / shape_.page_tokens;
    const size_t pages = lengths_.size() * slots_;
    // Bytes that read as NaN: what was never stored must not be used.
    arena_.assign(pages * page_bytes, static_cast<std::byte>(0xff));
    table_.resize(pages);
    for (size_t i = 0; i < pages; ++i) {  // scattered
      table_[i] = static_cast<int32_t>((pages - 1 - i) * page_bytes / kPageUnitBytes);
    }
    cache_.arena = arena_.data();
    cache_.key_offset = 0;
    cache_.value_offset = BytesOf(shape_.dtype, layer);
    cache_.dtype = shape_.dtype;
    cache_.page_tokens = shape_.page_tokens;
    cache_.kv_heads = shape_.kv_heads;
    cache_.head_dim = shape_.dim;
    cache_.table_stride = slots_;
    cache_.slots = slots_;
    done_.assign(lengths_.size(), 0);
    out_.assign(lengths_.size(), {});
    records_.assign(lengths_.size(), {});
  }

  // One step: `counts[s]` more tokens of each sequence (0: not in the step). Observes all rows if
  // `observe`.
  void Step(Backend& backend, const std::vector<int>& counts, bool observe,
            const std::vector<ProbeRange>& probes = {}) {
    const int qn = shape_.heads * shape_.dim, kn = shape_.kv_heads * shape_.dim;
    std::vector<float> q, out;
    std::vector<float> kf, vf;
    std::vector<int32_t> row_begin = {0}, start, table, rows, offsets = {0};
    std::vector<ProbeRange> all_probes;
    std::vector<int> members;
    for (size_t s = 0; s < lengths_.size(); ++s) {
      if (counts[s] == 0) continue;
      members.push_back(static_cast<int>(s));
      const int at = done_[s];
      q.insert(q.end(), q_[s].begin() + at * qn, q_[s].begin() + (at + counts[s]) * qn);
      kf.insert(kf.end(), k_[s].begin() + at * kn, k_[s].begin() + (at + counts[s]) * kn);
      vf.insert(vf.end(), v_[s].begin() + at * kn, v_[s].begin() + (at + counts[s]) * kn);
      start.push_back(at);
      row_begin.push_back(row_begin.back() + counts[s]);
      table.insert(table.end(), table_.begin() + s * slots_, table_.begin() + (s + 1) * slots_);
    }
    const int n = row_begin.back();
    for (int r = 0; r < n && observe; ++r) {
      rows.push_back(r);
      all_probes.insert(all_probes.end(), probes.begin(), probes.end());
      offsets.push_back(static_cast<int32_t>(all_probes.size()));
    }
    out.resize(q.size());
    std::vector<uint16_t> out_half(q.size());
    std::vector<uint8_t> k = Encode(shape_.dtype, kf), v = Encode(shape_.dtype, vf);
    const int layers = std::max(1, graph_layers);
    const size_t layer_records = static_cast<size_t>(n) * shape_.heads;
    std::vector<SpanRecord> records(layers * layer_records);

    // On a device everything travels there for the step, and what the ops wrote comes back.
    std::vector<Buffer> buffers;
    auto on_device = [&](auto& values) {
      using T = std::remove_reference_t<decltype(values[0])>;
      if (backend.host_memory() || values.empty()) return values.data();
      const size_t bytes = values.size() * sizeof(T);
      Buffer& buffer = buffers.emplace_back(backend.Allocate(bytes));
      backend.CopyIn(buffer.data(), values.data(), bytes);
      return reinterpret_cast<T*>(buffer.data());
    };
    const bool narrow = shape_.out == DType::kBF16;
    void* out_there = narrow ? static_cast<void*>(on_device(out_half)) : on_device(out);
    auto* records_there = on_device(records);
    cache_.arena = on_device(arena_);
    cache_.table = on_device(table);
    AttentionArgs a;
    a.query = View::Matrix(on_device(q), DType::kF32, n, qn).Heads(shape_.heads);
    a.key = View::Matrix(on_device(k), shape_.dtype, n, kn).Heads(shape_.kv_heads);
    a.value = View::Matrix(on_device(v), shape_.dtype, n, kn).Heads(shape_.kv_heads);
    a.out = View::Matrix(out_there, shape_.out, n, qn).Heads(shape_.heads);
    a.cache = cache_;
    a.batch = {static_cast<int>(members.size()),
               n,
               on_device(row_begin),
               on_device(start),
               row_begin.data(),
               start.data()};
    a.scale = Scale();
    a.window = shape_.window;
    a.softcap = shape_.softcap;
    if (shape_.sinks) a.sinks = View::Vector(on_device(sinks_), DType::kF32, shape_.heads);
    if (observe) {
      a.spans.rows = on_device(rows);
      a.spans.host_rows = rows.data();
      a.spans.count = n;
      a.spans.far_window = shape_.far_window;
      a.spans.records = records_there;
      if (!probes.empty()) {
        a.spans.probes = on_device(all_probes);
        a.spans.probe_offsets = on_device(offsets);
      }
    }
    const auto store = [&] {
      backend.Run(backend.ops().StoreKv, {a.key, a.value, cache_, a.batch, shape_.window});
    };
    const auto run = [&] {
      if (stores_first) store();
      for (int layer = 0; layer < layers; ++layer) {
        if (observe) a.spans.records = records_there + layer * layer_records;
        backend.Run(backend.ops().Attention, a);
      }
      if (!stores_first) store();
    };
    if (graph_layers == 0) {
      run();
    } else {
      static uint64_t key = 0;
      ++key;
      for (int i = 0; i < 3; ++i) backend.Repeat(key, run);  // at once, captured, replayed
    }
    if (!backend.host_memory()) {
      void* home = narrow ? static_cast<void*>(out_half.data()) : out.data();
      backend.CopyOut(home, out_there, a.out.bytes());
      backend.CopyOut(records.data(), records_there, records.size() * sizeof(SpanRecord));
      backend.CopyOut(arena_.data(), cache_.arena, arena_.size());
      cache_.arena = arena_.data();
    }
    for (size_t i = layer_records; observe && i < records.size(); ++i) {
      const SpanRecord &record = records[i], &first = records[i % layer_records];
      EXPECT_EQ(std::memcmp(&record, &first, sizeof(SpanRecord)), 0) << i;
    }
    if (narrow) std::transform(out_half.begin(), out_half.end(), out.begin(), FromBf16);
    for (size_t m = 0; m < members.size(); ++m) {
      const int s = members[m];
      out_[s].insert(out_[s].end(), out.begin() + row_begin[m] * qn,
                     out.begin() + row_begin[m + 1] * qn);
      records_[s].insert(records_[s].end(), records.begin() + row_begin[m] * shape_.heads,
                         records.begin() + row_begin[m + 1] * shape_.heads);
      done_[s] += counts[s];
    }
  }

  // All sequences to their ends, `chunk` tokens a step each.
  void RunAll(Backend& backend, int chunk, bool observe = false,
              const std::vector<ProbeRange>& probes = {}) {
    Rewind();
    while (true) {
      std::vector<int> counts(lengths_.size());
      bool any = false;
      for (size_t s = 0; s < lengths_.size(); ++s) {
        counts[s] = std::min(chunk, lengths_[s] - done_[s]);
        any |= counts[s] > 0;
      }
      if (!any) return;
      Step(backend, counts, observe, probes);
    }
  }

  struct Answer {
    std::vector<double> out;  // [dim]
    std::vector<double> p;    // [position + 1], zero outside the window
  };
  Answer Eager(int s, int position, int head) const {
    const int kv = head / (shape_.heads / shape_.kv_heads), dim = shape_.dim;
    const int first = shape_.window > 0 ? std::max(0, position - shape_.window + 1) : 0;
    Answer answer;
    answer.p.assign(position + 1, 0.0);
    answer.out.assign(dim, 0.0);
    double max = shape_.sinks ? sinks_[head] : -1e300;
    std::vector<double> scores(position + 1);
    for (int j = first; j <= position; ++j) {
      double dot = 0;
      for (int d = 0; d < dim; ++d) {
        dot += static_cast<double>(
                   q_[s][(static_cast<size_t>(position) * shape_.heads + head) * dim + d]) *
               k_[s][(static_cast<size_t>(j) * shape_.kv_heads + kv) * dim + d];
      }
      scores[j] = dot * Scale();
      if (shape_.softcap > 0) scores[j] = shape_.softcap * std::tanh(scores[j] / shape_.softcap);
      max = std::max(max, scores[j]);
    }
    double total = shape_.sinks ? std::exp(sinks_[head] - max) : 0;
    for (int j = first; j <= position; ++j) total += std::exp(scores[j] - max);
    for (int j = first; j <= position; ++j) {
      answer.p[j] = std::exp(scores[j] - max) / total;
      for (int d = 0; d < dim; ++d) {
        answer.out[d] +=
            answer.p[j] * v_[s][(static_cast<size_t>(j) * shape_.kv_heads + kv) * dim + d];
      }
    }
    return answer;
  }

  bool stores_first = false;  // before attention, as steps of one row a sequence may
  // If not 0, a step is of so many layers that are all the same, and repeated; its counts are 1.
  int graph_layers = 0;

  float Scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.dim)); }
  const AttentionShape& shape() const { return shape_; }
  const std::vector<int>& lengths() const { return lengths_; }
  const std::vector<std::vector<float>>& out() const { return out_; }
  const std::vector<std::vector<SpanRecord>>& records() const { return records_; }

 private:
  AttentionShape shape_;
  std::vector<int> lengths_;
  std::vector<std::vector<float>> q_, k_, v_, out_;
  std::vector<float> sinks_;
  std::vector<std::vector<SpanRecord>> records_;
  std::vector<std::byte> arena_;
  std::vector<int32_t> table_;
  std::vector<int> done_;
  KvView cache_;
  int slots_ = 0;
};

}  // namespace longspan::testing
