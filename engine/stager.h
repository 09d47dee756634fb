#pragma once
// Batch → Step: gathers what the forward pass reads into backend memory that was allocated once.
#include <memory>
#include <vector>

#include "engine/attention_spans.h"
#include "engine/kv_cache.h"
#include "engine/request.h"
#include "models/model.h"
#include "models/step.h"

namespace longspan {

// One sequence's share of a step.
struct StageItem {
  SequenceId cache = kNoSequence;
  absl::Span<const int32_t> tokens;  // the new tokens, positions begin, begin + 1, …
  int64_t begin = 0;
  bool wants_logits = false;  // of the last row
  bool observe = false;       // spans of the last row
  absl::Span<const ProbeRange> probes;
};

struct StagedStep {
  Step step;
  std::vector<int> first_row;  // per item
  std::vector<int> logit_row;  // per item: index into the returned logits, -1: none
  std::vector<int> observed;   // per item: index of its records, -1: none
};

class Stager {
 public:
  Stager(Backend& backend, const Model& model, int max_sequences);
  ~Stager() { AwaitRecords(); }  // which come to memory of its own
  Stager(const Stager&) = delete;
  Stager& operator=(const Stager&) = delete;

  // Valid until the next call.
  const StagedStep& Stage(const std::vector<StageItem>& items, KvCache& cache);
  // For Model::Logits: step rows [begin, begin + count).
  View RowRange(int begin, int count);
  // Of observed row `index` of the last step; call after Forward. They are there when
  // AwaitRecords() returns, and last until a later step's are asked for.
  SpanRow Records(const StagedStep& staged, int index);
  void AwaitRecords() { backend_.FinishCopyOut(); }

  static constexpr int kMaxProbes = 64;  // per sequence

 private:
  // Appends an array to what Stage() sends; returns where it lies.
  template <class T>
  size_t Put(const std::vector<T>& values);
  View Ints(size_t at, size_t count) const;

  Backend& backend_;
  const Model& model_;
  // Of a step; members so that they keep their memory.
  struct Lists {
    std::vector<int32_t> tokens, positions, row_begin, start, logit_rows, span_rows, probe_offsets;
    std::vector<ProbeRange> probes;
    std::vector<SequenceId> sequences;
  };
  Lists lists_;
  StagedStep staged_;
  // All that a step reads, here and in the backend's memory: one copy a step.
  std::vector<std::byte> host_;
  Buffer block_;
  size_t used_ = 0;
  Buffer more_rows_, records_;
  std::vector<SpanRecord> fetched_;
  bool fetched_valid_ = false;
};

}  // namespace longspan
