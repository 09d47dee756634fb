#include "engine/stager.h"

#include <algorithm>
#include <numeric>

namespace longspan {
namespace {

constexpr size_t kAlignment = 16;  // of each array of a step

}  // namespace

Stager::Stager(Backend& backend, const Model& model, int max_sequences)
    : backend_(backend), model_(model) {
  const size_t rows = model.max_rows();
  const size_t sequences = max_sequences;
  const size_t records = model.spec().layers.size() * sequences * model.max_heads();
  constexpr size_t kArrays = 8;
  const size_t ints = 2 * rows + (sequences + 1) * 2 + sequences * 3;
  host_.resize(ints * sizeof(int32_t) + sequences * kMaxProbes * sizeof(ProbeRange) +
               kArrays * kAlignment);
  block_ = backend.Allocate(host_.size());
  more_rows_ = backend.Allocate(model.max_logit_rows() * sizeof(int32_t));
  records_ = backend.Allocate(records * sizeof(SpanRecord));
}

template <class T>
size_t Stager::Put(const std::vector<T>& values) {
  const size_t at = used_;
  const size_t bytes = values.size() * sizeof(T);
  CHECK_LE(at + bytes, host_.size());
  std::copy_n(reinterpret_cast<const std::byte*>(values.data()), bytes, host_.begin() + at);
  used_ = (at + bytes + kAlignment - 1) / kAlignment * kAlignment;
  return at;
}

View Stager::Ints(size_t at, size_t count) const {
  return View::Vector(block_.data() + at, DType::kI32, static_cast<int64_t>(count));
}

const StagedStep& Stager::Stage(const std::vector<StageItem>& items, KvCache& cache) {
  StagedStep& staged = staged_;
  auto& [tokens, positions, row_begin, start, logit_rows, span_rows, probe_offsets, probes,
         sequences] = lists_;
  for (auto* list : {&tokens, &positions, &start, &logit_rows, &span_rows, &sequences,
                     &staged.first_row, &staged.logit_row, &staged.observed}) {
    list->clear();
  }
  probes.clear();
  row_begin.assign(1, 0);
  probe_offsets.assign(1, 0);
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

  used_ = 0;
  const size_t tokens_at = Put(tokens), positions_at = Put(positions), begin_at = Put(row_begin),
               start_at = Put(start), logits_at = Put(logit_rows), spans_at = Put(span_rows),
               probes_at = Put(probes), offsets_at = Put(probe_offsets);
  backend_.CopyIn(block_.data(), host_.data(), used_);

  Step& step = staged.step;
  step = Step();
  step.tokens = Ints(tokens_at, tokens.size());
  step.positions = Ints(positions_at, positions.size());
  step.batch.sequences = static_cast<int>(items.size());
  step.batch.rows = static_cast<int>(tokens.size());
  step.batch.row_begin = Ints(begin_at, row_begin.size()).as<int32_t>();
  step.batch.start = Ints(start_at, start.size()).as<int32_t>();
  step.batch.host_row_begin = reinterpret_cast<const int32_t*>(host_.data() + begin_at);
  step.batch.host_start = reinterpret_cast<const int32_t*>(host_.data() + start_at);
  step.caches = cache.Views(sequences);
  step.logit_rows = Ints(logits_at, logit_rows.size());
  step.spans.count = static_cast<int>(span_rows.size());
  if (!span_rows.empty()) {
    step.spans.rows = Ints(spans_at, span_rows.size()).as<int32_t>();
    step.spans.host_rows = reinterpret_cast<const int32_t*>(host_.data() + spans_at);
    step.spans.far_window = model_.spec().window();
    if (!probes.empty()) {
      step.spans.probes = reinterpret_cast<const ProbeRange*>(block_.data() + probes_at);
      step.spans.probe_offsets = Ints(offsets_at, probe_offsets.size()).as<int32_t>();
    }
    step.span_records = reinterpret_cast<SpanRecord*>(records_.data());
  }
  fetched_valid_ = false;
  return staged;
}

View Stager::RowRange(int begin, int count) {
  std::vector<int32_t> rows(count);
  std::iota(rows.begin(), rows.end(), begin);
  CHECK_LE(rows.size() * sizeof(int32_t), more_rows_.bytes());
  backend_.CopyIn(more_rows_.data(), rows.data(), rows.size() * sizeof(int32_t));
  return View::Vector(more_rows_.data(), DType::kI32, count);
}

SpanRow Stager::Records(const StagedStep& staged, int index) {
  const size_t layer_stride = static_cast<size_t>(staged.step.spans.count) * model_.max_heads();
  if (!fetched_valid_) {
    AwaitRecords();
    fetched_.resize(model_.spec().layers.size() * layer_stride);
    backend_.CopyOutLater(fetched_.data(), records_.data(), fetched_.size() * sizeof(SpanRecord));
    fetched_valid_ = true;
  }
  return {fetched_.data(), layer_stride, static_cast<size_t>(index)};
}

}  // namespace longspan
