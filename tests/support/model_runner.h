#pragma once
// Drives a Model without an engine: each sequence has caches of its own, the simplest that KvView
// allows, and a step appends tokens to any of them. CPU only.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "models/model.h"

namespace longspan::testing {

// The folder's model, or a test failure that says why not (CHECK).
std::unique_ptr<Model> LoadTestModel(const std::string& path, Backend& backend,
                                     DType cache_dtype = DType::kF32, int max_rows = 512);

class ModelRunner {
 public:
  ModelRunner(Backend& backend, Model& model, int sequences, int max_tokens, int page_tokens = 16);

  // Appends tokens[s] to sequence s (none: it is not in the step). Returns the logits of all new
  // rows, sequence by sequence: [rows, vocab].
  std::vector<float> Step(const std::vector<std::vector<int32_t>>& tokens);
  // One sequence's tokens in steps of at most `chunk`.
  std::vector<float> Feed(int sequence, const std::vector<int32_t>& tokens, int chunk);
  // Bytes of the keys and values that layer `layer` may still read for the next token of
  // `sequence`: all positions, or on a window layer the last window - 1.
  std::vector<std::byte> Visible(int layer, int sequence) const;

  // Observe the last row of each step: filled per layer and head, [layers][max_heads].
  bool observe = false;
  std::vector<SpanRecord> records;

 private:
  struct LayerCache {
    std::vector<std::byte> arena;
    std::vector<int32_t> table;   // [sequences, slots]
    std::vector<int32_t> staged;  // rows of `table` of the step's sequences
    int window = 0;
    KvView view;
  };
  Model& model_;
  std::vector<LayerCache> layers_;
  std::vector<int64_t> done_;
};

}  // namespace longspan::testing
