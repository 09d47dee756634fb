#include "tests/support/model_runner.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <variant>

namespace longspan::testing {

std::unique_ptr<Model> LoadTestModel(const std::string& path, Backend& backend, DType cache_dtype,
                                     int max_rows) {
  auto checkpoint = Checkpoint::Open(path);
  CHECK(checkpoint.ok()) << checkpoint.status();
  auto model =
      Model::Load(*std::move(checkpoint), backend,
                  {.max_rows = max_rows, .max_logit_rows = max_rows, .cache_dtype = cache_dtype});
  CHECK(model.ok()) << model.status();
  return *std::move(model);
}

ModelRunner::ModelRunner(Backend& backend, Model& model, int sequences, int max_tokens,
                         int page_tokens)
    : model_(model), done_(sequences) {
  CHECK(backend.host_memory());
  for (const LayerSpec& layer : model.spec().layers) {
    const auto& a = std::get<AttentionSpec>(layer.mixer);
    LayerCache& cache = layers_.emplace_back();
    cache.window = a.window.value_or(0);
    const int positions = a.window.has_value() ? *a.window - 1 + page_tokens : max_tokens;
    const int slots = (positions + page_tokens - 1) / page_tokens;
    const int64_t half =
        BytesOf(model.cache_dtype(), int64_t{a.kv_heads} * page_tokens * a.head_dim);
    const int64_t page = (2 * half + kPageUnitBytes - 1) / kPageUnitBytes * kPageUnitBytes;
    cache.arena.resize(page * slots * sequences);
    for (int i = 0; i < slots * sequences; ++i) {
      cache.table.push_back(static_cast<int32_t>(i * page / kPageUnitBytes));
    }
    cache.view.arena = cache.arena.data();
    cache.view.value_offset = half;
    cache.view.dtype = model.cache_dtype();
    cache.view.page_tokens = page_tokens;
    cache.view.kv_heads = a.kv_heads;
    cache.view.head_dim = a.head_dim;
    cache.view.table_stride = slots;
    cache.view.slots = slots;
  }
}

std::vector<float> ModelRunner::Step(const std::vector<std::vector<int32_t>>& tokens) {
  std::vector<int32_t> ids, positions, row_begin = {0}, start;
  for (LayerCache& cache : layers_) cache.staged.clear();
  for (size_t s = 0; s < tokens.size(); ++s) {
    if (tokens[s].empty()) continue;
    start.push_back(static_cast<int32_t>(done_[s]));
    for (int32_t id : tokens[s]) {
      ids.push_back(id);
      positions.push_back(static_cast<int32_t>(done_[s]++));
    }
    row_begin.push_back(static_cast<int32_t>(ids.size()));
    for (LayerCache& cache : layers_) {
      const auto row = cache.table.begin() + static_cast<int64_t>(s) * cache.view.slots;
      cache.staged.insert(cache.staged.end(), row, row + cache.view.slots);
    }
  }
  const int rows = static_cast<int>(ids.size());
  std::vector<int32_t> wanted(rows);
  std::iota(wanted.begin(), wanted.end(), 0);
  std::vector<KvView> views;
  for (LayerCache& cache : layers_) {
    views.push_back(cache.view);
    views.back().table = cache.staged.data();
  }
  longspan::Step step;
  step.tokens = View::Vector(ids.data(), DType::kI32, rows);
  step.positions = View::Vector(positions.data(), DType::kI32, rows);
  step.batch = {static_cast<int>(start.size()), rows, row_begin.data(), start.data()};
  step.caches = views.data();
  step.logit_rows = View::Vector(wanted.data(), DType::kI32, rows);
  const int32_t last = rows - 1;
  if (observe) {
    records.assign(layers_.size() * model_.max_heads(), {});
    step.spans.rows = &last;
    step.spans.count = 1;
    step.spans.far_window = model_.spec().window();
    step.span_records = records.data();
  }
  const View logits = model_.Forward(step);
  return {logits.as<float>(), logits.as<float>() + logits.elements()};
}

std::vector<float> ModelRunner::Feed(int sequence, const std::vector<int32_t>& tokens, int chunk) {
  std::vector<float> logits;
  for (size_t at = 0; at < tokens.size(); at += chunk) {
    std::vector<std::vector<int32_t>> step(done_.size());
    const size_t end = std::min(tokens.size(), at + chunk);
    step[sequence].assign(tokens.begin() + at, tokens.begin() + end);
    const std::vector<float> part = Step(step);
    logits.insert(logits.end(), part.begin(), part.end());
  }
  return logits;
}

std::vector<std::byte> ModelRunner::Visible(int layer, int sequence) const {
  const LayerCache& cache = layers_[layer];
  KvView view = cache.view;
  view.table = cache.table.data();
  const int64_t first =
      cache.window > 0 ? std::max<int64_t>(0, done_[sequence] - cache.window + 1) : 0;
  const int64_t row_bytes = BytesOf(view.dtype, view.head_dim);
  std::vector<std::byte> bytes;
  for (int64_t p = first; p < done_[sequence]; ++p) {
    for (int64_t offset : {view.key_offset, view.value_offset}) {
      for (int h = 0; h < view.kv_heads; ++h) {
        const std::byte* row = view.Page(sequence, p) + offset +
                               (h * view.page_tokens + p % view.page_tokens) * row_bytes;
        bytes.insert(bytes.end(), row, row + row_bytes);
      }
    }
  }
  return bytes;
}

}  // namespace longspan::testing
