#pragma once
// From a checkpoint's own description to a ModelSpec, and from its tensor names to canonical slots.
// A family of known mixers is one mapping here and one golden test.
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "models/checkpoint.h"
#include "models/spec.h"

namespace longspan {

// Reads config.json (+ generation_config.json for eos) or GGUF metadata; bounds every number; a
// config that needs what no op has yields a spec that MissingFor() refuses, one that is not
// understood an error naming the key. layer_types wins over sliding_window; both `rope_parameters`
// and `rope_theta`/`rope_scaling`/`rope_local_base_freq` schemas are read.
absl::StatusOr<ModelSpec> ReadSpec(const Checkpoint& checkpoint);

// The same from a path, of weights that need not be there or be readable: a directory with
// config.json, such a file alone (any name ending in .json), or a .gguf file. For `describe`.
absl::StatusOr<ModelSpec> ReadSpecAt(const std::string& path);

// Parses config.json's text alone (fuzzed).
absl::StatusOr<ModelSpec> SpecFromConfigJson(absl::string_view config,
                                             absl::string_view generation_config);
absl::StatusOr<ModelSpec> SpecFromGguf(const GgufMetadata& metadata);

// A tensor that the forward pass reads, and where the checkpoint keeps it.
struct Slot {
  enum class Id : uint8_t {
    kEmbedding,
    kFinalNorm,
    kOutput,  // once per model
    kMixerNorm,
    kQ,
    kK,
    kV,
    kQNorm,
    kKNorm,
    kO,
    kMixerPostNorm,  // per layer
    kMlpNorm,
    kGate,
    kUp,
    kDown,
    kMlpPostNorm,
    kSinks
  };
  Id id;
  int layer = -1;              // -1: once per model
  std::string tensor;          // name in the checkpoint
  std::vector<int64_t> shape;  // required
  bool plus_one = false;       // fold: 1 + w
};

// Every slot that `spec` needs, by the names of `format`. GGUF's Gemma norms already hold 1 + w.
// Tied embeddings have no kOutput; only attention layers with a dense MLP have slots.
std::vector<Slot> SlotsOf(const ModelSpec& spec, Checkpoint::Format format);

// The slot's tensor, or InvalidArgument naming file, tensor and both shapes. Vectors must be F32,
// F16 or BF16; matrices may be of any dtype.
absl::StatusOr<const TensorInfo*> FindSlot(const Checkpoint& checkpoint, const Slot& slot);

}  // namespace longspan
