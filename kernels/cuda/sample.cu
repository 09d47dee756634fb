// Draws tokens from rows of logits: one block a token, a few passes over its row, which L2 holds.
// Sums are in an order that the launch fixes, or of integers, so that a draw repeats bit by bit.
#include <algorithm>
#include <cfloat>
#include <climits>

#include "kernels/cuda/check_cuda.h"
#include "kernels/cuda/context.h"
#include "kernels/cuda/numbers.cuh"
#include "kernels/cuda/ops_cuda.h"

namespace longspan::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
constexpr float kNoLogit = -INFINITY;

struct Problem {
  const float* logits;
  int64_t row_stride;
  int vocab;
  const Draw* draws;
  const LogitEdit* edits;
  float* edited;  // [draws, vocab]: rows with edits are copied here
  int32_t* tokens;
};

// What is left after min-p, top-k and top-p, as on the CPU.
struct Cut {
  float value;
  int last_tie;
  __device__ bool Keeps(float x, int id) const {
    return x > value || (x == value && id <= last_tie);
  }
};

__device__ float Finite(float x) { return x <= FLT_MAX ? x : kNoLogit; }  // false for NaN too

__device__ float Penalise(float logit, const LogitEdit& edit, const Draw& draw) {
  logit = logit > 0 ? logit / draw.repetition_penalty : logit * draw.repetition_penalty;
  logit -= draw.frequency_penalty * static_cast<float>(edit.count);
  if (edit.count > 0) logit -= draw.presence_penalty;
  return fminf(logit, FLT_MAX);
}

__device__ float Apply(const LogitEdit& edit, const Draw& draw, float logit) {
  switch (edit.kind) {
    case LogitEdit::Kind::kBias:
      return logit + edit.bias;
    case LogitEdit::Kind::kPenalty:
      return isfinite(logit) ? Penalise(logit, edit, draw) : logit;
    default:
      return kNoLogit;
  }
}

// The row with its edits, kind by kind: within one, no two threads write the same logit different
// values.
__device__ const float* Edited(const Problem& p, const Draw& draw, const float* row) {
  float* edited = p.edited + int64_t{blockIdx.x} * p.vocab;
  for (int i = threadIdx.x; i < p.vocab; i += kThreads) edited[i] = row[i];
  for (const auto kind :
       {LogitEdit::Kind::kBias, LogitEdit::Kind::kPenalty, LogitEdit::Kind::kBan}) {
    __syncthreads();
    for (int e = draw.edit_begin + threadIdx.x; e < draw.edit_end; e += kThreads) {
      const LogitEdit edit = p.edits[e];
      if (edit.kind == kind) edited[edit.token] = Apply(edit, draw, edited[edit.token]);
    }
  }
  __syncthreads();
  return edited;
}

// The smallest id that no ban names. Rare, and short where it happens: by one thread.
__device__ int SmallestAllowed(const Problem& p, const Draw& draw) {
  int id = 0;
  for (int e = draw.edit_begin; e < draw.edit_end && id < p.vocab;) {
    const bool bans = p.edits[e].kind == LogitEdit::Kind::kBan && p.edits[e].token == id;
    id += bans;
    e = bans ? draw.edit_begin : e + 1;
  }
  return id;
}

struct Best {
  float value;
  int id;  // INT_MAX: none
};

__device__ Best Better(Best a, Best b) {
  return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// Of the whole block, to all its threads.
__device__ Best Highest(const float* row, int vocab) {
  __shared__ Best parts[kWarps];
  Best best{kNoLogit, INT_MAX};
#pragma unroll 8
  for (int i = threadIdx.x; i < vocab; i += kThreads) {
    const float x = Finite(row[i]);
    if (x > best.value) best = {x, i};
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    best = Better(
        best, {__shfl_xor_sync(~0u, best.value, offset), __shfl_xor_sync(~0u, best.id, offset)});
  }
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = best;
  __syncthreads();
  best = parts[0];
  for (int w = 1; w < kWarps; ++w) best = Better(best, parts[w]);
  __syncthreads();
  return best;
}

// Unsigned integers in the order of the floats; one for both zeros.
__device__ uint32_t KeyOf(float x) {
  const uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ float ValueOf(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

struct Border {
  float value;     // the largest v for which all that is >= v has the mass asked for
  uint64_t above;  // mass of what is > v
};

// mass: uint64(float), 0 for what does not count; together at least `wanted`. A radix search from
// the highest bits: each pass gathers the masses of the values that share the bits found so far.
template <class Mass>
__device__ Border FindBorder(const float* row, int vocab, uint64_t wanted, Mass mass) {
  constexpr int kBits = 11, kBins = 1 << kBits;
  __shared__ unsigned long long bins[kBins];
  __shared__ uint32_t found;
  __shared__ uint64_t above;
  if (threadIdx.x == 0) {
    found = 0;
    above = 0;
  }
  uint32_t known = 0;  // mask of the bits found so far
  for (int shift = 32 - kBits; known != ~0u; shift = max(shift - kBits, 0)) {
    for (int b = threadIdx.x; b < kBins; b += kThreads) bins[b] = 0;
    __syncthreads();
    const uint32_t prefix = found;
    const uint32_t digit = ~known & (~0u << shift);  // the bits that this pass finds
    for (int i = threadIdx.x; i < vocab; i += kThreads) {
      const float x = Finite(row[i]);
      const uint32_t key = KeyOf(x);
      if ((key & known) != prefix) continue;
      if (const uint64_t m = mass(x); m > 0) {
        atomicAdd(&bins[(key & digit) >> shift], static_cast<unsigned long long>(m));
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {  // the first lane has the highest bins
      constexpr int kOwn = kBins / kWarp;
      int b = kBins - 1 - threadIdx.x * kOwn;
      uint64_t own = 0;
      for (int i = 0; i < kOwn; ++i) own += bins[b - i];
      uint64_t before = above + own;
      for (int offset = 1; offset < kWarp; offset *= 2) {
        const uint64_t higher = __shfl_up_sync(~0u, before - above, offset);
        if (threadIdx.x >= offset) before += higher;
      }
      const uint32_t reach = __ballot_sync(~0u, before >= wanted);
      before -= own;
      if (static_cast<int>(threadIdx.x) == (reach != 0 ? __ffs(reach) - 1 : kWarp - 1)) {
        while (b > 0 && before + bins[b] < wanted) before += bins[b--];
        found = prefix | (static_cast<uint32_t>(b) << shift);
        above = before;
      }
    }
    known |= digit;
    __syncthreads();
  }
  const Border border{ValueOf(found), above};
  __syncthreads();
  return border;
}

// Walks tokens in order of id until the weights, double(float x, int id), add up to more than
// left(total): the token where they do. Halts at the last that has weight, should rounding ask for
// more. Each level splits what is left in a part for each warp.
template <class Weight, class Left>
__device__ int Walk(const float* row, int vocab, Weight weight, Left left_of) {
  __shared__ double sums[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int begin = 0, end = vocab;
  double left = -1;
  for (bool first = true; first || end - begin > kWarp; first = false) {
    const int part = (end - begin + kWarps - 1) / kWarps;
    const int from = min(begin + warp * part, end), to = min(from + part, end);
    double sum = 0;
#pragma unroll 4
    for (int i = from + lane; i < to; i += kWarp) sum += weight(Finite(row[i]), i);
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      sum += __shfl_xor_sync(~0u, sum, offset);
    }
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    if (first) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += sums[w];
      left = left_of(total);
    }
    int chosen = 0;
    double before = 0, passed = 0;  // before: the weight of all parts before the chosen one
    for (int w = 0; w < kWarps; ++w) {
      if (sums[w] > 0) {
        chosen = w;
        before = passed;
      }
      passed += sums[w];
      if (left < passed) break;
    }
    left -= before;
    begin = min(begin + chosen * part, end);
    end = min(begin + part, end);
    __syncthreads();
  }
  int id = begin;
  for (int i = begin; i < end; ++i) {
    const double w = weight(Finite(row[i]), i);
    if (w == 0) continue;
    id = i;
    left -= w;
    if (left < 0) break;
  }
  return id;
}

// The cut of top-p among what `cut` leaves.
__device__ Cut CutTopP(const float* row, int vocab, const Draw& draw, float highest, Cut cut) {
  constexpr float kUnit = 1ull << 40;  // of mass; a row of 2^23 tokens does not overflow
  const auto mass = [&](float x) -> uint64_t {
    if (!(x >= cut.value)) return 0;
    return __float2ull_rn(expf((x - highest) * draw.inverse_temperature) * kUnit);
  };
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  uint64_t own = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < vocab; i += kThreads) own += mass(Finite(row[i]));
  for (int offset = kWarp / 2; offset > 0; offset /= 2) own += __shfl_xor_sync(~0u, own, offset);
  if (threadIdx.x % kWarp == 0) atomicAdd(&total, static_cast<unsigned long long>(own));
  __syncthreads();
  const auto wanted =
      static_cast<uint64_t>(ceil(static_cast<double>(draw.top_p) * static_cast<double>(total)));
  const Border border = FindBorder(row, vocab, max(wanted, uint64_t{1}), mass);
  // Of those at the border as many as it takes, smaller ids first.
  const uint64_t each = max(mass(border.value), uint64_t{1});
  const uint64_t missing = wanted > border.above ? wanted - border.above : 1;
  const double ties = static_cast<double>((missing + each - 1) / each);
  const auto is_tie = [&](float x, int) { return x == border.value ? 1.0 : 0.0; };
  const int last = Walk(row, vocab, is_tie, [&](double) { return ties - 0.5; });
  return {border.value, last};
}

__device__ int Token(const Problem& p, const Draw& draw, const float* row) {
  const Best best = Highest(row, p.vocab);
  if (best.id == INT_MAX) return SmallestAllowed(p, draw);
  if (draw.inverse_temperature == 0) return best.id;
  Cut cut{static_cast<float>(best.value + draw.min_p_margin), INT_MAX};
  if (draw.top_k > 0 && draw.top_k < p.vocab) {
    // With fewer finite logits than k the border is -infinity: nothing is cut.
    const auto one = [](float) { return uint64_t{1}; };
    cut.value = fmaxf(cut.value, FindBorder(row, p.vocab, draw.top_k, one).value);
  }
  if (draw.top_p < 1) cut = CutTopP(row, p.vocab, draw, best.value, cut);
  const auto weight = [&](float x, int id) -> double {
    return cut.Keeps(x, id) ? expf((x - best.value) * draw.inverse_temperature) : 0.0f;
  };
  return Walk(row, p.vocab, weight, [&](double total) { return draw.uniform * total; });
}

__global__ void __launch_bounds__(kThreads, 1) SampleRows(Problem p) {
  const Draw draw = p.draws[blockIdx.x];
  const float* row = p.logits + draw.row * p.row_stride;
  if (draw.edit_begin < draw.edit_end) row = Edited(p, draw, row);
  const int token = Token(p, draw, row);
  if (threadIdx.x == 0) p.tokens[blockIdx.x] = token;
}

}  // namespace

void Sample(BackendContext& context, const SampleArgs& a) {
  Problem p;
  p.logits = a.logits.as<float>();
  p.row_stride = a.logits.stride[0];
  p.vocab = static_cast<int>(a.logits.shape[1]);
  p.edits = a.edits;
  const size_t row_bytes = a.logits.shape[1] * sizeof(float);
  const int64_t at_once = static_cast<int64_t>(BackendContext::kWorkspaceBytes / row_bytes);
  const int64_t count = a.tokens.shape[0];
  p.edited = static_cast<float*>(context.Workspace(std::min(count, at_once) * row_bytes));
  for (int64_t first = 0; first < count; first += at_once) {
    p.draws = a.draws + first;
    p.tokens = a.tokens.as<int32_t>() + first;
    SampleRows<<<static_cast<int>(std::min(count - first, at_once)), kThreads, 0, context.stream>>>(
        p);
  }
  CheckLaunch(context, "Sample");
}

}  // namespace longspan::cuda
