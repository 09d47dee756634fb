#define LONGSPAN_TARGET
#include "kernels/cpu/attention_tile.inl"

namespace longspan::cpu {

const AttentionTile kPortableAttentionTile = {kLanes, Load, Scores, Softmax, Accumulate};

}  // namespace longspan::cpu
