#pragma once
// Attention spans of a graph: layers leave scores and partial results behind, and one kernel at the
// graph's end makes all their records. A layer's own kernel would have a tenth of the work that the
// device has room for, and the products that follow it would wait for the room that it takes.
#include "kernels/cuda/context.h"

namespace longspan::cuda {

struct LateSpans;  // what layers left so far; attention_spans.cu

// Before the first of the functions below.
LateSpans* MakeLateSpans();
void FreeLateSpans(LateSpans* spans);

// Around a capture: what is attended in between is observed at its end.
void BeginLateSpans(BackendContext& context);
void EndLateSpans(BackendContext& context);

}  // namespace longspan::cuda
