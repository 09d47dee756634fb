#pragma once
// A random hybrid of a few thousand parameters, made in memory, with a tokenizer of bytes and
// letters: for tests of what is around a model.
#include "kernels/backend.h"
#include "models/model.h"

namespace longspan::testing {

struct TinyOptions {
  int layers = 4;  // sliding and full in turn
  int heads = 4;
  int window = 8;
  int max_context = 512;
  int max_rows = 512;
  int max_logit_rows = 64;
  uint32_t seed = 1;
};

inline constexpr int kTinyEos = 2;

LoadedModel TinyModel(Backend& backend, const TinyOptions& options = {});

}  // namespace longspan::testing
