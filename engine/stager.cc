#include "engine/stager.h"

#include <numeric>

namespace longspan {

Stager::Stager(Backend& backend, const Model& model, int max_sequences)
    : backend_(backend), model_(model) {
  const size_t rows = model.max_rows();
  const size_t sequences = max_sequences;
  const size_t records = model.spec().layers.size() * sequences * model.max_heads();
  tokens_ = backend.Allocate(rows * sizeof(int32_t));
  positions_ = backend.Allocate(rows * sizeof(int32_t));
  row_begin_ = backend.Allocate((sequences + 1) * sizeof(int32_t));
  start_ = backend.Allocate(sequences * sizeof(int32_t));
  logit_rows_ = backend.Allocate(sequences * sizeof(int32_t));
  more_rows_ = backend.Allocate(model.max_logit_rows() * sizeof(int32_t));
  span_rows_ = backend.Allocate(sequences * sizeof(int32_t));
  probes_ = backend.Allocate(sequences * kMaxProbes * sizeof(ProbeRange));
  probe_offsets_ = backend.Allocate((sequences + 1) * sizeof(int32_t));
  records_ = backend.Allocate(records * sizeof(SpanRecord));
}

template <class T>
View Stager::Upload(Buffer& buffer, const std::vector<T>& values) {
  const size_t bytes = values.size() * sizeof(T);
  CHECK_LE(bytes, buffer.bytes());
  if (bytes > 0) backend_.CopyIn(buffer.data(), values.data(), bytes);
  return View::Vector(buffer.data(), DType::kI32, static_cast<int64_t>(values.size()));
}

StagedStep Stager::Stage(const std::vector<StageItem>& items, KvCache& cache) {
  StagedStep staged;
  std::vector<int32_t> tokens, positions, row_begin = {0}, start, logit_rows, span_rows,
                                          probe_offsets = {0};
  std::vector<ProbeRange> probes;
  std::vector<SequenceId> sequences;
  for (const StageItem& item : items) {
    const int first = static_cast<int>(tokens.size());
    staged.first_row.push_back(first);
    tokens.insert(tokens.end(), item.tokens.begin(), item.tokens.end());
    for (size_t i = 0; i < item.tokens.size(); ++i) {
      positions.push_back(static_cast<int32_t>(item.begin + static_cast<int64_t>(i)));
    }
    const int last = static_cast<int>(tokens.size()) - 1;
    row_begin.push_back(last + 1);
    start.push_back(static_cast<int32_t>(item.begin));
    sequences.push_back(item.cache);
    staged.logit_row.push_back(item.wants_logits ? static_cast<int>(logit_rows.size()) : -1);
    if (item.wants_logits) logit_rows.push_back(last);
    staged.observed.push_back(item.observe ? static_cast<int>(span_rows.size()) : -1);
    if (item.observe) {
      span_rows.push_back(last);
      probes.insert(probes.end(), item.probes.begin(), item.probes.end());
      probe_offsets.push_back(static_cast<int32_t>(probes.size()));
    }
  }

  Step& step = staged.step;
  step.tokens = Upload(tokens_, tokens);
  step.positions = Upload(positions_, positions);
  step.batch.sequences = static_cast<int>(items.size());
  step.batch.rows = static_cast<int>(tokens.size());
  step.batch.row_begin = Upload(row_begin_, row_begin).as<int32_t>();
  step.batch.start = Upload(start_, start).as<int32_t>();
  step.caches = cache.Views(sequences);
  step.logit_rows = Upload(logit_rows_, logit_rows);
  step.spans.count = static_cast<int>(span_rows.size());
  if (!span_rows.empty()) {
    step.spans.rows = Upload(span_rows_, span_rows).as<int32_t>();
    step.spans.far_window = model_.spec().window();
    if (!probes.empty()) {
      step.spans.probes = Upload(probes_, probes).as<ProbeRange>();
      step.spans.probe_offsets = Upload(probe_offsets_, probe_offsets).as<int32_t>();
    }
    step.span_records = reinterpret_cast<SpanRecord*>(records_.data());
  }
  fetched_valid_ = false;
  return staged;
}

View Stager::RowRange(int begin, int count) {
  std::vector<int32_t> rows(count);
  std::iota(rows.begin(), rows.end(), begin);
  return Upload(more_rows_, rows);
}

const std::vector<SpanRecord>& Stager::Records(const StagedStep& staged, int index) {
  const ModelSpec& spec = model_.spec();
  const size_t layers = spec.layers.size();
  const size_t heads = model_.max_heads();
  const size_t count = staged.step.spans.count;
  if (!fetched_valid_) {
    fetched_.resize(layers * count * heads);
    backend_.CopyOut(fetched_.data(), records_.data(), fetched_.size() * sizeof(SpanRecord));
    fetched_valid_ = true;
  }
  row_.assign(layers * heads, SpanRecord());
  for (size_t l = 0; l < layers; ++l) {
    const size_t own = std::get<AttentionSpec>(spec.layers[l].mixer).heads;
    for (size_t h = 0; h < own; ++h) {
      row_[l * heads + h] = fetched_[l * count * heads + index * own + h];
    }
  }
  return row_;
}

}  // namespace longspan
