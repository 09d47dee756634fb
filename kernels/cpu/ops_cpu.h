#pragma once
// The CPU's op functions, as backend_cpu.cc puts them into the op table. Contracts: kernels/ops.h.
#include "kernels/ops.h"

namespace longspan::cpu {

struct BackendContext;  // kernels/cpu/context.h

void Embed(BackendContext& context, const EmbedArgs& args);
void RmsNorm(BackendContext& context, const RmsNormArgs& args);
void AddRmsNorm(BackendContext& context, const AddRmsNormArgs& args);
void MatMul(BackendContext& context, const MatMulArgs& args);
void PrepareQkv(BackendContext& context, const PrepareQkvArgs& args);
void Attention(BackendContext& context, const AttentionArgs& args);
void StoreKv(BackendContext& context, const StoreKvArgs& args);
void GatedMatMul(BackendContext& context, const GatedMatMulArgs& args);
void Gather(BackendContext& context, const GatherArgs& args);
void Softcap(BackendContext& context, const SoftcapArgs& args);
void Sample(BackendContext& context, const SampleArgs& args);

// As Backend::ProductInput.
DType ProductInput(const MatMulArgs& product);

}  // namespace longspan::cpu
