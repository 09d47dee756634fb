#include "kernels/cpu/lanes.h"

#define LONGSPAN_TARGET LONGSPAN_AVX2
#include "kernels/cpu/attention_tile.inl"

namespace longspan::cpu {

const AttentionTile kAttentionTileAvx2 = {kLanes, Load, Scores, Softmax, Accumulate};

}  // namespace longspan::cpu
