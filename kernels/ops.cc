// Names and costs of the ops: the least that any implementation must move and compute.
#include "kernels/ops.h"

#include <algorithm>
#include <initializer_list>
#include <sstream>

namespace longspan {
namespace {

// Work of reading and writing whole views once, with `flops` operations.
Work Touching(std::initializer_list<const View*> views, int64_t flops) {
  Work work{0, flops};
  for (const View* view : views) work.bytes += view->bytes();
  return work;
}

// Sum over t in [begin, end) of the positions that a query at t sees.
int64_t VisiblePairs(int64_t begin, int64_t end, int64_t window) {
  const int64_t full = window > 0 ? std::clamp(window, begin, end) : end;  // t < full: sees t + 1
  const int64_t ramp = (full * (full + 1) - begin * (begin + 1)) / 2;
  return ramp + (end - full) * window;
}

}  // namespace

Work Cost(const EmbedArgs& a) {
  Work work = Touching({&a.tokens, &a.out}, a.out.elements());
  work.bytes += BytesOf(a.table.dtype, a.out.elements());
  return work;
}

// Square, add, two products.
Work Cost(const RmsNormArgs& a) { return Touching({&a.x, &a.weight, &a.out}, 4 * a.x.elements()); }

// A sum, and as RmsNorm for each weight.
Work Cost(const AddRmsNormArgs& a) {
  Work work = Touching({&a.x, &a.x_weight, &a.residual, &a.residual}, a.x.elements());
  if (!a.x_weight.empty()) work.flops += 4 * a.x.elements();
  if (!a.weight.empty()) {
    work.bytes += a.weight.bytes() + a.out.bytes();
    work.flops += 4 * a.x.elements();
  }
  return work;
}

Work Cost(const MatMulArgs& a) {
  Work work = Touching({&a.x, &a.out}, 2 * a.x.shape[1] * a.out.elements());
  for (int i = 0; i < a.part_count; ++i) work.bytes += a.parts[i].bytes();
  return work;
}

// As RmsNorm for normed heads; four products and two sums for each rotated pair; one for each
// number rounded. Queries that nothing changes are not touched. What goes to the cache too is
// written twice.
Work Cost(const PrepareQkvArgs& a) {
  const int64_t query_heads = a.query_heads(), kv_heads = a.key.shape[1];
  const int64_t rows = a.qkv.shape[0];
  const View keys = a.qkv.Columns(0, kv_heads * a.key.shape[2]);
  const View queries = a.qkv.Columns(0, query_heads * a.key.shape[2]);
  Work work =
      Touching({&keys, &keys, &a.key, &a.value, &a.query_norm, &a.key_norm}, 2 * a.key.elements());
  if (!a.query_norm.empty()) work.flops += 4 * queries.elements();
  if (!a.key_norm.empty()) work.flops += 4 * keys.elements();
  if (!a.frequencies.empty()) {
    work.bytes += a.positions.bytes() + a.frequencies.bytes();
    work.flops += 6 * rows * (query_heads + kv_heads) * a.frequencies.elements();
  }
  if (!a.query_norm.empty() || !a.frequencies.empty()) work.bytes += 2 * queries.bytes();
  if (a.cache.arena != nullptr) work.bytes += a.key.bytes() + a.value.bytes();
  return work;
}

Work Cost(const AttentionArgs& a) {
  const int64_t kv_row = BytesOf(a.cache.dtype, int64_t{2} * a.cache.kv_heads * a.cache.head_dim);
  const int32_t* row_begin = a.batch.HostRowBegin();
  const int32_t* start = a.batch.HostStart();
  int64_t pairs = 0;
  int64_t kv_rows = 0;
  for (int s = 0; s < a.batch.sequences; ++s) {
    const int64_t rows = row_begin[s + 1] - row_begin[s];
    if (rows == 0) continue;
    const int64_t begin = start[s];
    const int64_t first = a.window > 0 ? std::max<int64_t>(0, begin - a.window + 1) : 0;
    pairs += VisiblePairs(begin, begin + rows, a.window);
    kv_rows += begin + rows - first;
  }
  // Two products and two sums per pair and dimension: the logit, and the weighted value.
  Work work = Touching({&a.query, &a.out}, 4 * pairs * a.query.shape[1] * a.query.shape[2]);
  work.bytes += kv_rows * kv_row;
  return work;
}

Work Cost(const StoreKvArgs& a) {
  const int32_t* row_begin = a.batch.HostRowBegin();
  int64_t rows = 0;
  for (int s = 0; s < a.batch.sequences; ++s) {
    const int64_t own = row_begin[s + 1] - row_begin[s];
    rows += a.window > 0 ? std::min<int64_t>(own, a.window) : own;
  }
  const int64_t kv_row = BytesOf(a.cache.dtype, int64_t{2} * a.cache.kv_heads * a.cache.head_dim);
  return {2 * rows * kv_row, 0};
}

// As MatMul, whose out need not exist; then exponential, division, two products and a sum, each
// counted as one.
Work Cost(const GatedMatMulArgs& a) {
  Work work = Cost(a.product);
  work.bytes += a.out.bytes() - a.product.out.bytes();
  work.flops += 5 * a.out.elements();
  return work;
}

Work Cost(const GatherArgs& a) { return Touching({&a.rows, &a.out, &a.out}, 0); }

// Division, tanh, product.
Work Cost(const SoftcapArgs& a) { return Touching({&a.x, &a.x}, 3 * a.x.elements()); }

// A read of each row is the least; what it computes depends on the knobs.
Work Cost(const SampleArgs& a) {
  return {a.tokens.shape[0] * BytesOf(a.logits.dtype, a.logits.shape[1]), 0};
}

std::string KindOf(const MatMulArgs& a) {
  std::ostringstream kind;
  kind << Info(a.parts[0].dtype).name << " " << a.parts[0].shape[1];
  for (int i = 0; i < a.part_count; ++i) kind << (i == 0 ? "x" : "+") << a.parts[i].shape[0];
  return kind.str();
}

std::string KindOf(const GatedMatMulArgs& a) { return KindOf(a.product); }

std::string KindOf(const AttentionArgs& a) {
  return a.window > 0 ? "window " + std::to_string(a.window) : "full";
}

const char* OpName(OpId op) {
  static constexpr const char* kNames[] = {
#define LONGSPAN_OP_STRING(name) #name,
      LONGSPAN_OPS(LONGSPAN_OP_STRING)
#undef LONGSPAN_OP_STRING
  };
  return op < OpId::kCount ? kNames[static_cast<int>(op)] : "?";
}

}  // namespace longspan
