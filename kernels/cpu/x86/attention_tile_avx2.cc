#include "kernels/cpu/lanes.h"
#include "kernels/cpu/x86/sets.h"

#define LONGSPAN_TARGET LONGSPAN_AVX2
#include "kernels/cpu/attention_tile.inl"

namespace longspan::cpu {

const AttentionTile kAvx2AttentionTile = {kLanes, Load, Scores, Softmax, Accumulate};

}  // namespace longspan::cpu
