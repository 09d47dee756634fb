// Attention over cached pages and the step's own rows, blocked over keys with an online softmax.
//
// Work is cut into items: the query heads of one KV head of up to kTileQueries / group consecutive
// tokens of one sequence. Keys are visited in blocks of kBlockKeys aligned to absolute positions,
// gathered into segments of kSegmentKeys whose partial results are merged in ascending order. Both
// borders are fixed by position alone, so a row's bits depend neither on chunking nor on neighbours
// nor on threads. When there are fewer items than threads could use, the segments of an item are
// computed in parallel.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "kernels/check.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/ops_cpu.h"
#include "kernels/cpu/span_state.h"

namespace longspan::cpu {
namespace {

// Of one partial result: long enough that merging does not show, and half of a window of 512, so
// that two threads share a decoding step's keys evenly wherever it stands. Gemma 3 270M, 1 sequence
// at 2,048: 127 us an op at 512, 92 at 256; prefill of 2,048 the same.
constexpr int kSegmentKeys = 256;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The query heads of one KV head for tokens [first_row, first_row + tokens) of a sequence.
struct Item {
  int sequence = 0;
  int kv_head = 0;
  int first_row = 0;
  int tokens = 0;
  int64_t first_position = 0;
};

// Running softmax of an item's queries; query = token * group + head within the group.
struct Partial {
  float* max;        // [queries]
  float* sum;        // [queries]
  float* out;        // [queries, padded]
  SpanState* spans;  // [observed tokens * group]

  static size_t Bytes(int queries, int padded, int observed) {
    return sizeof(float) * (static_cast<size_t>(queries) * (padded + 2)) +
           sizeof(SpanState) * observed + 64;
  }
  static Partial At(std::byte* memory, int queries, int observed) {
    Partial p;
    p.spans = reinterpret_cast<SpanState*>(memory);
    p.max = reinterpret_cast<float*>(memory + sizeof(SpanState) * observed);
    p.sum = p.max + queries;
    p.out = p.sum + queries;
    return p;
  }
  void Reset(int queries, int padded, int observed) {
    std::fill(max, max + queries, kMinusInfinity);
    std::fill(sum, sum + queries, 0.0f);
    std::fill(out, out + static_cast<size_t>(queries) * padded, 0.0f);
    for (int i = 0; i < observed; ++i) new (&spans[i]) SpanState();
  }
};

class Job {
 public:
  Job(const AttentionArgs& args, Simd simd)
      : a_(args),
        simd_(simd),
        tile_(SetOf(simd).attention),
        heads_(static_cast<int>(args.query.shape[1])),
        dim_(static_cast<int>(args.query.shape[2])),
        padded_((dim_ + tile_.lanes - 1) / tile_.lanes * tile_.lanes),
        group_(heads_ / args.cache.kv_heads) {
    CHECK(a_.out.dtype == DType::kF32);
    CHECK_EQ(heads_ % a_.cache.kv_heads, 0);
    CHECK_LE(group_, kTileQueries);
  }

  void Run(BackendContext& context);

 private:
  template <class Visit>
  void ForEachItem(Visit visit) const;
  int64_t FirstKey(int64_t position) const {
    return a_.window > 0 ? std::max<int64_t>(0, position - a_.window + 1) : 0;
  }
  int FirstSegment(const Item& item) const {
    return static_cast<int>(FirstKey(item.first_position) / kSegmentKeys);
  }
  int LastSegment(const Item& item) const {
    return static_cast<int>((item.first_position + item.tokens - 1) / kSegmentKeys);
  }
  // Range of this item's tokens in the list of observed rows.
  std::pair<int, int> Observed(const Item& item) const;

  size_t WorkBytes() const {
    return sizeof(float) * (kTileQueries * padded_ + 2 * kBlockKeys * padded_ +
                            kTileQueries * (kBlockKeys + 1)) +
           64;
  }
  size_t PartialBytes(const Item& item) const {
    const auto [begin, end] = Observed(item);
    return (Partial::Bytes(item.tokens * group_, padded_, (end - begin) * group_) + 63) / 64 * 64;
  }
  Partial PartialAt(const Item& item, std::byte* memory) const {
    const auto [begin, end] = Observed(item);
    return Partial::At(memory, item.tokens * group_, (end - begin) * group_);
  }
  void Reset(const Item& item, Partial& partial) const {
    const auto [begin, end] = Observed(item);
    partial.Reset(item.tokens * group_, padded_, (end - begin) * group_);
  }

  void RunItems(BackendContext& context, int64_t count) const;
  void RunSegments(BackendContext& context, int64_t count, size_t partial_bytes) const;
  // The tokens of the item that see keys of the block.
  Item Seeing(const Item& item, int64_t block) const;
  void LoadQueries(const Item& item, float* queries) const;
  void LoadBlock(const Item& item, int64_t block, int begin, int end, float* keys,
                 float* values) const;
  void Segment(const Item& item, int segment, std::byte* work, Partial& partial) const;
  void Mask(const Item& item, int64_t block, float* scores) const;
  void AddSpans(const Item& item, const Item& seeing, int64_t block, const float* scores,
                Partial& partial) const;
  void Merge(const Item& item, const Partial& from, Partial& to) const;
  void Finish(const Item& item, const Partial& partial) const;

  const AttentionArgs& a_;
  const Simd simd_;
  const AttentionTile& tile_;
  int heads_, dim_, padded_, group_;
};

template <class Visit>
void Job::ForEachItem(Visit visit) const {
  const int tokens = std::max(1, kTileQueries / group_);
  for (int s = 0; s < a_.batch.sequences; ++s) {
    const int begin = a_.batch.row_begin[s], end = a_.batch.row_begin[s + 1];
    for (int row = begin; row < end; row += tokens) {
      for (int h = 0; h < a_.cache.kv_heads; ++h) {
        visit(Item{s, h, row, std::min(tokens, end - row),
                   static_cast<int64_t>(a_.batch.start[s]) + row - begin});
      }
    }
  }
}

std::pair<int, int> Job::Observed(const Item& item) const {
  const int32_t* rows = a_.spans.rows;
  const int32_t* begin = std::lower_bound(rows, rows + a_.spans.count, item.first_row);
  const int32_t* end = std::lower_bound(begin, rows + a_.spans.count, item.first_row + item.tokens);
  return {static_cast<int>(begin - rows), static_cast<int>(end - rows)};
}

Item Job::Seeing(const Item& item, int64_t block) const {
  const int64_t base = block * kBlockKeys;
  const int64_t end = item.first_position + item.tokens;
  const int64_t first = std::max(item.first_position, base);
  const int64_t last = a_.window > 0 ? std::min(end, base + kBlockKeys + a_.window - 1) : end;
  return {item.sequence, item.kv_head,
          item.first_row + static_cast<int>(first - item.first_position),
          static_cast<int>(last - first), first};
}

void Job::LoadQueries(const Item& item, float* queries) const {
  for (int t = 0; t < item.tokens; ++t) {
    for (int g = 0; g < group_; ++g, queries += padded_) {
      const int head = item.kv_head * group_ + g;
      const float* from = a_.query.as<float>() + (item.first_row + t) * a_.query.stride[0] +
                          head * a_.query.stride[1];
      for (int d = 0; d < dim_; ++d) queries[d] = from[d] * a_.scale;
      std::fill(queries + dim_, queries + padded_, 0.0f);
    }
  }
}

// Keys and values [begin, end) of the block.
void Job::LoadBlock(const Item& item, int64_t block, int begin, int end, float* keys,
                    float* values) const {
  const KvView& cache = a_.cache;
  const int64_t base = block * kBlockKeys;
  const int64_t start = a_.batch.start[item.sequence], last = base + end;
  for (int64_t position = base + begin; position < last;) {
    float* to_keys = keys + (position - base) * padded_;
    float* to_values = values + (position - base) * padded_;
    int count;  // positions that lie evenly spaced from here
    if (position < start) {
      const int row = static_cast<int>(position % cache.page_tokens);
      count = static_cast<int>(
          std::min<int64_t>(cache.page_tokens - row, std::min(last, start) - position));
      const int64_t stride = BytesOf(cache.dtype, dim_);
      const std::byte* at = cache.Page(item.sequence, position) +
                            (int64_t{item.kv_head} * cache.page_tokens + row) * stride;
      tile_.load(cache.dtype, at + cache.key_offset, stride, count, dim_, padded_, to_keys);
      tile_.load(cache.dtype, at + cache.value_offset, stride, count, dim_, padded_, to_values);
    } else {
      count = static_cast<int>(last - position);
      const int64_t row = a_.batch.row_begin[item.sequence] + position - start;
      for (const auto& [from, to] : {std::pair{&a_.key, to_keys}, {&a_.value, to_values}}) {
        tile_.load(from->dtype,
                   from->row(row) + BytesOf(from->dtype, item.kv_head * from->stride[1]),
                   BytesOf(from->dtype, from->stride[0]), count, dim_, padded_, to);
      }
    }
    position += count;
  }
}

void Job::Mask(const Item& item, int64_t block, float* scores) const {
  const int64_t base = block * kBlockKeys;
  for (int t = 0; t < item.tokens; ++t) {
    const int64_t position = item.first_position + t;
    const int first =
        static_cast<int>(std::clamp<int64_t>(FirstKey(position) - base, 0, kBlockKeys));
    const int last = static_cast<int>(std::clamp<int64_t>(position + 1 - base, 0, kBlockKeys));
    for (int g = 0; g < group_; ++g, scores += kBlockKeys) {
      if (a_.softcap > 0) {
        for (int k = first; k < last; ++k)
          scores[k] = a_.softcap * std::tanh(scores[k] / a_.softcap);
      }
      std::fill(scores, scores + first, kMinusInfinity);
      std::fill(scores + std::max(first, last), scores + kBlockKeys, kMinusInfinity);
    }
  }
}

void Job::AddSpans(const Item& item, const Item& seeing, int64_t block, const float* scores,
                   Partial& partial) const {
  const int first = Observed(item).first;
  const auto [begin, end] = Observed(seeing);
  for (int o = begin; o < end; ++o) {
    const int token = a_.spans.rows[o] - item.first_row;
    SpanState::Edges edges;
    edges.position = item.first_position + token;
    edges.far_window = a_.spans.far_window;
    edges.own_window = a_.window;
    if (a_.spans.probe_offsets != nullptr) {
      edges.probes = a_.spans.probes + a_.spans.probe_offsets[o];
      edges.probe_count = a_.spans.probe_offsets[o + 1] - a_.spans.probe_offsets[o];
    }
    for (int g = 0; g < group_; ++g) {
      partial.spans[(o - first) * group_ + g].Add(
          edges, block * kBlockKeys, scores + (token * group_ + g) * kBlockKeys, simd_);
    }
  }
}

// `work` begins with the item's queries.
void Job::Segment(const Item& item, int segment, std::byte* work, Partial& partial) const {
  auto* query = reinterpret_cast<float*>(work);
  float* keys = query + static_cast<size_t>(kTileQueries) * padded_;
  float* values = keys + static_cast<size_t>(kBlockKeys) * padded_;
  float* scores = values + static_cast<size_t>(kBlockKeys) * padded_;
  float* rescale = scores + static_cast<size_t>(kTileQueries) * kBlockKeys;

  const int64_t first = std::max<int64_t>(FirstKey(item.first_position),
                                          static_cast<int64_t>(segment) * kSegmentKeys);
  const int64_t last = std::min<int64_t>(item.first_position + item.tokens,
                                         static_cast<int64_t>(segment + 1) * kSegmentKeys);
  for (int64_t block = first / kBlockKeys; block * kBlockKeys < last; ++block) {
    const int64_t base = block * kBlockKeys;
    const Item seeing = Seeing(item, block);
    const int q_begin = (seeing.first_row - item.first_row) * group_;
    const int q_end = q_begin + seeing.tokens * group_;
    const int begin =
        static_cast<int>(std::max<int64_t>(FirstKey(seeing.first_position) - base, 0));
    const int end = static_cast<int>(
        std::min<int64_t>(seeing.first_position + seeing.tokens - base, kBlockKeys));
    LoadBlock(item, block, begin, end, keys, values);
    float* own_scores = scores + q_begin * kBlockKeys;
    tile_.scores(query + q_begin * padded_, q_end - q_begin, keys, begin, end, padded_, own_scores);
    Mask(seeing, block, own_scores);
    if (a_.spans.count > 0) AddSpans(item, seeing, block, scores, partial);

    for (int q = q_begin; q < q_end; ++q) {
      float max, sum;
      tile_.softmax(scores + q * kBlockKeys, partial.max[q], &max, &sum);
      rescale[q] = max == partial.max[q] ? 1.0f : std::exp(partial.max[q] - max);
      partial.sum[q] = partial.sum[q] * rescale[q] + sum;
      partial.max[q] = max;
    }
    tile_.accumulate(own_scores, q_end - q_begin, values, begin, end, padded_, rescale + q_begin,
                     partial.out + static_cast<size_t>(q_begin) * padded_);
  }
}

void Job::Merge(const Item& item, const Partial& from, Partial& to) const {
  for (int q = 0; q < item.tokens * group_; ++q) {
    if (from.max[q] == kMinusInfinity) continue;
    float* out = to.out + static_cast<size_t>(q) * padded_;
    const float* add = from.out + static_cast<size_t>(q) * padded_;
    if (to.max[q] == kMinusInfinity) {  // as a row has it whose item begins with this segment
      std::copy_n(add, padded_, out);
      to.sum[q] = from.sum[q];
      to.max[q] = from.max[q];
      continue;
    }
    const float max = std::max(from.max[q], to.max[q]);
    const float old_scale = std::exp(to.max[q] - max);
    const float new_scale = std::exp(from.max[q] - max);
    for (int d = 0; d < padded_; ++d) out[d] = out[d] * old_scale + add[d] * new_scale;
    to.sum[q] = to.sum[q] * old_scale + from.sum[q] * new_scale;
    to.max[q] = max;
  }
  const auto [begin, end] = Observed(item);
  for (int i = 0; i < (end - begin) * group_; ++i) to.spans[i].Merge(from.spans[i]);
}

void Job::Finish(const Item& item, const Partial& partial) const {
  const float* sinks = a_.sinks.empty() ? nullptr : a_.sinks.as<float>();
  for (int q = 0; q < item.tokens * group_; ++q) {
    const int head = item.kv_head * group_ + q % group_;
    float scale = 1;
    float sum = partial.sum[q];
    if (sinks != nullptr) {
      const float max = std::max(partial.max[q], sinks[head]);
      scale = std::exp(partial.max[q] - max);
      sum = sum * scale + std::exp(sinks[head] - max);
    }
    const float inverse = scale / sum;
    float* out = a_.out.as<float>() + (item.first_row + q / group_) * a_.out.stride[0] +
                 head * a_.out.stride[1];
    const float* from = partial.out + static_cast<size_t>(q) * padded_;
    for (int d = 0; d < dim_; ++d) out[d] = from[d] * inverse;
  }
  const auto [begin, end] = Observed(item);
  for (int o = begin; o < end; ++o) {
    const int64_t position = item.first_position + a_.spans.rows[o] - item.first_row;
    for (int g = 0; g < group_; ++g) {
      const int head = item.kv_head * group_ + g;
      const double sink = sinks != nullptr ? sinks[head] : -std::numeric_limits<double>::infinity();
      a_.spans.records[static_cast<int64_t>(o) * heads_ + head] =
          partial.spans[(o - begin) * group_ + g].Record(position, sink);
    }
  }
}

void Job::Run(BackendContext& context) {
  const int threads = context.team.threads();
  int64_t items = 0, segments = 0;
  int most_segments = 0;
  size_t partial_bytes = 0;  // of all segments
  ForEachItem([&](const Item& item) {
    const int own = LastSegment(item) - FirstSegment(item) + 1;
    ++items;
    segments += own;
    most_segments = std::max(most_segments, own);
    partial_bytes += own * PartialBytes(item);
  });
  if (threads > 1 && most_segments > 1 && items < 4 * threads) {
    RunSegments(context, segments, partial_bytes);
  } else {
    RunItems(context, items);
  }
}

void Job::RunItems(BackendContext& context, int64_t count) const {
  auto* items = reinterpret_cast<Item*>(context.SharedScratch(count * sizeof(Item)));
  ForEachItem([end = items](const Item& item) mutable { *end++ = item; });
  context.team.For(count, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const Item& item = items[i];
      const size_t bytes = PartialBytes(item);
      std::byte* memory = context.Scratch(thread, 2 * bytes + WorkBytes());
      Partial total = PartialAt(item, memory);
      Partial part = PartialAt(item, memory + bytes);
      std::byte* work = memory + 2 * bytes;
      LoadQueries(item, reinterpret_cast<float*>(work));
      Reset(item, total);
      Segment(item, FirstSegment(item), work, total);
      for (int s = FirstSegment(item) + 1; s <= LastSegment(item); ++s) {
        Reset(item, part);
        Segment(item, s, work, part);
        Merge(item, part, total);
      }
      Finish(item, total);
    }
  });
}

void Job::RunSegments(BackendContext& context, int64_t count, size_t partial_bytes) const {
  struct Piece {
    Item item;
    int segment;
    std::byte* partial;
  };
  std::byte* memory = context.SharedScratch(partial_bytes + count * sizeof(Piece));
  auto* pieces = reinterpret_cast<Piece*>(memory + partial_bytes);
  ForEachItem([&, partial = memory, end = pieces](const Item& item) mutable {
    for (int s = FirstSegment(item); s <= LastSegment(item); ++s) {
      *end++ = {item, s, partial};
      partial += PartialBytes(item);
    }
  });
  context.team.For(count, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const Piece& piece = pieces[i];
      Partial part = PartialAt(piece.item, piece.partial);
      Reset(piece.item, part);
      std::byte* work = context.Scratch(thread, WorkBytes());
      LoadQueries(piece.item, reinterpret_cast<float*>(work));
      Segment(piece.item, piece.segment, work, part);
    }
  });
  for (const Piece* piece = pieces; piece != pieces + count;) {
    const Item& item = piece->item;
    Partial total = PartialAt(item, piece->partial);
    ++piece;
    for (int s = FirstSegment(item) + 1; s <= LastSegment(item); ++s, ++piece) {
      Merge(item, PartialAt(item, piece->partial), total);
    }
    Finish(item, total);
  }
}

}  // namespace

void Attention(BackendContext& context, const AttentionArgs& args) {
  Job(args, context.simd).Run(context);
}

}  // namespace longspan::cpu
