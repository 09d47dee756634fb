#pragma once
// A checkpoint without files of weights: a config.json says which tensors there are, random numbers
// fill them. A model's speed depends on its shapes and not on what it has learnt.
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "models/checkpoint.h"

namespace longspan {

struct RandomWeights {
  DType matrices = DType::kBF16;  // or Q8_0, Q4_K; norms are F32
  uint64_t seed = 1;
  // Matrices lie one over the other in memory for little more than the largest of them. For
  // backends that copy weights to memory of their own: read in place, weights that share bytes
  // would be found in the processor's caches and look faster than they are.
  bool overlapping = false;
};

// Every tensor that `config` (the path of a config.json) needs, by the names that Hugging Face has.
// Matrices have mean 0 and deviation 0.02, norms stay about 1; the same seed gives the same bytes,
// overlapping or not. InvalidArgument as for real checkpoints; ResourceExhausted with the bytes
// that it needs and those that the machine has.
absl::StatusOr<std::unique_ptr<Checkpoint>> MakeRandomCheckpoint(const std::string& config,
                                                                 const RandomWeights& weights);

}  // namespace longspan
