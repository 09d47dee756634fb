#pragma once
// One forward pass over a ragged batch, in the backend's form. Built by engine/stager from a Batch;
// all arrays live in backend memory that was allocated once. Prefill and decode are the same thing
// with different token counts.
#include <cstdint>
#include <vector>

#include "kernels/kv_view.h"
#include "kernels/ops.h"
#include "kernels/span_record.h"

namespace longspan {

struct Step {
  View tokens;     // [rows] I32
  View positions;  // [rows] I32
  RaggedBatch batch;
  const KvView* caches = nullptr;  // [layers]: where layer l's keys and values are
  View logit_rows;                 // [n] I32, the rows whose logits are wanted; n may be 0
  SpanRequest spans;               // records == nullptr; see span_records
  // Written when spans.count > 0: layer l's records begin at l * spans.count * Model::max_heads()
  // and are [spans.count, heads of that layer].
  SpanRecord* span_records = nullptr;
};

}  // namespace longspan
