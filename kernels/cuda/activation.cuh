#pragma once
// The activations of GatedMatMul.

namespace longspan::cuda {

// activation(gate) * up. Gelu in the tanh form of Hendrycks and Gimpel, arXiv 1606.08415:
// 0.5 x (1 + tanh u) = x * sigmoid(2 u).
__device__ __forceinline__ float Activated(bool gelu, float gate, float up) {
  const float of = gelu ? (gate + gate * gate * gate * 0.044715f) * 1.59576912160573071176f : gate;
  return gate / (1.0f + expf(-of)) * up;
}

}  // namespace longspan::cuda
