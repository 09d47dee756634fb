#pragma once
// The op table: every operation a model's forward pass is made of, as an args struct of views, a
// one-line contract and its cost. A backend fills an OpTable with its functions; a null entry is a
// capability that it lacks. std only: nvcc compiles this.
//
// Laws that hold on every backend's ops:
//  - a row's result depends on that row's inputs only, never on how many rows the call has or in
//    which chunk of its sequence the row arrived (bitwise on a CPU, and on a GPU with
//    CudaOptions::deterministic);
//  - sums are accumulated in fp32 or wider; activations are F32 unless an op says otherwise. An out
//    that may be BF16 or I8 may be so where Backend::ProductInput asks for it, and is then the F32
//    result rounded to nearest even, but for what Attention says, or as the product would have
//    quantised it;
//  - ops take effect in call order and never allocate memory that outlives the call.
#include <cstdint>
#include <string>

#include "kernels/draw.h"
#include "kernels/kv_view.h"
#include "kernels/span_record.h"
#include "kernels/view.h"

namespace longspan {

// Bytes and floating-point operations that an op must move at least (inputs read once, outputs
// written once); divided by time it gives GB/s and FLOP/s.
struct Work {
  int64_t bytes = 0;
  int64_t flops = 0;
};

// out[i] = table[tokens[i]] * scale. table: [vocab, dim] any weight dtype; tokens: [rows] I32;
// out: [rows, dim].
struct EmbedArgs {
  View table, tokens, out;
  float scale = 1;
};

// out = x / sqrt(mean(x^2) + eps) * weight, row by row. x: [rows, dim]; out: as x (may be x), or
// BF16 or I8 elsewhere; weight: [dim] F32.
struct RmsNormArgs {
  View x, weight, out;
  float eps = 1e-6f;
};

// What lies between two blocks of a model: residual += x, or += RmsNorm(x) where x_weight is given
// (a post-norm); then, where weight is given, out = RmsNorm(residual) (the next block's pre-norm).
// x, residual, out: [rows, dim], three memories, out F32, BF16 or I8; x_weight, weight: [dim] F32,
// or empty.
struct AddRmsNormArgs {
  View x, x_weight, residual, weight, out;
  float eps = 1e-6f;
};

// out = x · weightᵀ, the parts' columns side by side: out[:, 0:n0] from parts[0] and so on (q|k|v
// and gate|up are products of one input). x: [rows, in] F32, or BF16 or I8 where
// Backend::ProductInput says so; parts: [n_i, in] any weight dtype, as Backend::PlaceWeights gave
// them; out: [rows, n0 + n1 + n2] F32, or BF16 where x is. Quantised weights are multiplied as
// integers of their own bits.
struct MatMulArgs {
  View x;
  View parts[3];
  int part_count = 1;
  View out;
};

// From the product q | k | v to what attention takes: RmsNorm of each head of q and of k where its
// weight is given, rotary positions of q and k where frequencies are given, then k and v rounded
// (to nearest even) to the cache's dtype; to Q8_0 as GGUF does: of 32 numbers the scale is the
// largest magnitude / 127. Queries stay in qkv; its columns of k are lost.
// qkv: [rows, query_heads * head_dim + 2 * kv_heads * head_dim]; query_norm, key_norm: [head_dim]
// F32, or empty; positions: [rows] I32; key, value: [rows, kv_heads, head_dim], F32, BF16 or, on a
// CPU, Q8_0.
// Positions rotate pairs of the first 2 * frequencies dims of a head by position * frequency;
// frequencies: [rotary_dim / 2] F32, radians per token, or empty. interleaved: pairs (2i, 2i+1),
// else (i, i + rotary_dim / 2). `magnitude` scales the rotated dims.
// cache: where its arena is given, row i is sequence i's only one in the step, and its keys and
// values are stored as StoreKv would, at positions[i]. That attention comes after it is no harm: a
// ring's slots hold window - 1 + page_tokens positions or more, so what the row at t displaces is
// at t - window or before, where t sees nothing.
struct PrepareQkvArgs {
  View qkv, query_norm, key_norm, positions, frequencies, key, value;
  KvView cache = {};
  bool interleaved = false;
  float magnitude = 1;
  float eps = 1e-6f;

  int64_t query_heads() const { return qkv.shape[1] / key.shape[2] - 2 * key.shape[1]; }
};

// One ragged batch of sequences in a step: sequence s owns rows [row_begin[s], row_begin[s + 1]) of
// the step, at positions start[s], start[s] + 1, …  Its earlier positions lie in the caches.
struct RaggedBatch {
  int sequences = 0;
  int rows = 0;
  const int32_t* row_begin = nullptr;  // [sequences + 1], in the backend's memory
  const int32_t* start = nullptr;      // [sequences], in the backend's memory
  // The same numbers in host memory, for whoever sizes a launch; nullptr: row_begin and start are.
  const int32_t* host_row_begin = nullptr;
  const int32_t* host_start = nullptr;

  const int32_t* HostRowBegin() const { return host_row_begin ? host_row_begin : row_begin; }
  const int32_t* HostStart() const { return host_start ? host_start : start; }
};

// Softmax attention of each row over its sequence's cached positions (from `cache`, positions <
// start) and the step's own earlier rows (from `key` / `value`), causal. window W > 0: the row at t
// sees t - W < j <= t, Hugging Face's convention; 0: all j <= t. Keys are visited in blocks aligned
// to absolute positions, so chunking never changes a result. query, out: [rows, heads, head_dim]
// F32, or out BF16; key, value: [rows, kv_heads, head_dim] in the cache's dtype. softcap c > 0:
// logits become c * tanh(logit / c). sinks: [heads] F32 or empty: one extra logit per head that
// takes mass and adds no value. For a BF16 out, queries and probabilities may be rounded to it too.
struct AttentionArgs {
  View query, key, value, out;
  KvView cache;
  RaggedBatch batch;
  float scale = 1;
  int window = 0;
  float softcap = 0;
  View sinks;
  SpanRequest spans;
};

// Writes the step's keys and values into the cache after attention has read it: all rows, or on a
// ring (window > 0) only each sequence's last `window` rows. key, value: [rows, kv_heads, head_dim]
// in the cache's dtype.
struct StoreKvArgs {
  View key, value;
  KvView cache;
  RaggedBatch batch;
  int window = 0;
};

enum class Activation : uint8_t { kSilu, kGeluTanh };

// out = activation(gate) * up, where the product is gate | up, of two parts [dim, in]. out: [rows,
// dim], F32, BF16 or I8. The memory of product.out may serve as scratch and is undefined
// afterwards.
struct GatedMatMulArgs {
  MatMulArgs product;
  View out;
  Activation activation = Activation::kSilu;
};

// out[i] = x[rows[i]]. x: [n, dim]; rows: [m] I32; out: [m, dim].
struct GatherArgs {
  View x, rows, out;
};

// x = cap * tanh(x / cap) in place. x: [rows, dim].
struct SoftcapArgs {
  View x;
  float cap = 0;
};

// tokens[i] = the token that draws[i] draws from its row of logits. logits: [rows, vocab] F32, not
// modified; draws: [count] and their edits, in the backend's memory; tokens: [count] I32. A tie at
// top-k's border keeps all that tie; at top-p's border smaller ids win; greedy takes the smallest
// id of the highest. Logits that are not finite read as -infinity; if all are, the smallest id that
// is not banned is taken, or vocab if every one is.
struct SampleArgs {
  View logits;
  const Draw* draws = nullptr;
  const LogitEdit* edits = nullptr;
  View tokens;
};

Work Cost(const EmbedArgs& a);
Work Cost(const RmsNormArgs& a);
Work Cost(const AddRmsNormArgs& a);
Work Cost(const MatMulArgs& a);
Work Cost(const PrepareQkvArgs& a);
Work Cost(const AttentionArgs& a);
Work Cost(const StoreKvArgs& a);
Work Cost(const GatedMatMulArgs& a);
Work Cost(const GatherArgs& a);
Work Cost(const SoftcapArgs& a);
Work Cost(const SampleArgs& a);

// What tells calls of one op apart where they are timed: "window 1024" or "full" of attention, of a
// product its weights, "Q4_K 640x2048+2048" (in x out); "" of other ops.
template <class Args>
std::string KindOf(const Args&) {
  return "";
}
std::string KindOf(const MatMulArgs& a);
std::string KindOf(const GatedMatMulArgs& a);
std::string KindOf(const AttentionArgs& a);

// The single list of ops: the table, the profile and the names are made from it.
#define LONGSPAN_OPS(X) \
  X(Embed)              \
  X(RmsNorm)            \
  X(AddRmsNorm)         \
  X(MatMul)             \
  X(PrepareQkv) X(Attention) X(StoreKv) X(GatedMatMul) X(Gather) X(Softcap) X(Sample)

enum class OpId : uint8_t {
#define LONGSPAN_OP_ID(name) k##name,
  LONGSPAN_OPS(LONGSPAN_OP_ID)
#undef LONGSPAN_OP_ID
      kCount
};
inline constexpr int kOpCount = static_cast<int>(OpId::kCount);
const char* OpName(OpId op);

// A backend's state that ops need (thread team, stream, workspace); opaque to callers. Each backend
// derives its own, of the same name, in its namespace.
struct BackendContext {
 protected:
  BackendContext() = default;
  ~BackendContext() = default;
};

template <class Args>
struct Op {
  OpId id = OpId::kCount;
  void (*function)(BackendContext&, const Args&) = nullptr;
};

struct OpTable {
#define LONGSPAN_OP_ENTRY(name) Op<name##Args> name{OpId::k##name, nullptr};
  LONGSPAN_OPS(LONGSPAN_OP_ENTRY)
#undef LONGSPAN_OP_ENTRY
};

}  // namespace longspan
