#pragma once
// What the device was seen to do at most: a plain read of its memory, and a large bf16 product.
#include "kernels/backend.h"
#include "kernels/cuda/context.h"

namespace longspan::cuda {

// Both zero if the device has faulted or lacks the memory to measure with.
Roofline MeasureRoofline(BackendContext& context);

}  // namespace longspan::cuda
