#pragma once
// Softmax attention of up to kHeads query heads over bf16 keys and values by one warp, in steps of
// kStep keys that lie in shared memory.
//
// The tensor cores multiply. Queries and probabilities are fp32: each is the sum of two bf16, which
// keeps 16 bits of it. The 16 rows of a product of queries are 8 heads' high and low parts.
#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/tensor_cores.cuh"

namespace longspan::cuda {

constexpr int kStep = kSplitUnit;  // keys, or values, of a stage: [kStep, kDim]
constexpr int kVector = 8;         // elements of 16 bytes

inline void CheckQueries(const Problem& p) {
  CHECK(reinterpret_cast<uintptr_t>(p.query) % 8 == 0 && p.query_row % 2 == 0 &&
        p.query_head % 2 == 0)
      << "queries are read in pairs";
}

// Keys of a strand.
struct Item {
  int row;     // of the launch
  int strand;  // of the row
  int first;   // key that the row sees
  int first_head, heads;
  int begin, end;  // of the keys; equal: there is no item
};

// Where vector v of row r of a stage lies, in bytes: so that neither copies nor ldmatrix meet a
// bank twice.
template <int kDim>
__device__ __forceinline__ uint32_t PlaceInStage(int row, int vector) {
  return (row * kDim + (vector ^ row % 8) * kVector) * sizeof(Bf16);
}

// Copies keys and values of a strand to shared memory, kStep at a time, as a warp. Lane l knows
// where row l % kStep of the next step lies: half of the lanes of the keys, half of the values.
template <int kDim>
class StepCopier {
 public:
  __device__ explicit StepCopier(const Piece& p) : p_(p) {}

  // The next step begins at key j; no key from `end` on is read.
  __device__ __forceinline__ void Seek(const Row& row, int kv_head, int j, int end) {
    sequence_ = row.sequence;
    start_ = row.start;
    flight_ = row.flight;
    kv_head_ = kv_head;
    j_ = j;
    end_ = end;
    in_page_ = j + static_cast<int>(threadIdx.x % kStep);
    slot_ = 0;
    Locate();
  }
  __device__ __forceinline__ void Advance() {
    j_ += kStep;
    in_page_ += kStep;
    Locate();
  }
  __device__ __forceinline__ bool AtEnd() const { return j_ >= end_; }
  // The next `steps` are whole and in the cache: older than the kernels that are under way.
  __device__ __forceinline__ bool Cached(int steps) const {
    return j_ + steps * kStep <= min(end_, start_);
  }

  // The next step's keys, or values, come to `to`, each vector to its PlaceInStage; behind the end,
  // nothing.
  template <bool kValues>
  __device__ __forceinline__ void Copy(uint32_t to) const {
    if (j_ < end_) {
      constexpr int kVectors = kDim / kVector, kRows = kWarp / kVectors;  // of one instruction
      const int lane = threadIdx.x % kWarp, row = lane / kVectors, vector = lane % kVectors;
      const auto from = reinterpret_cast<uintptr_t>(base_ + kPageUnitBytes * unit_);
      const int last = min(kStep, end_ - j_) - 1;  // of rows; it stands for those behind it
      to += row * kDim * sizeof(Bf16) + (vector ^ row) * sizeof(uint4);
#pragma unroll
      for (int i = 0; i < kStep; i += kRows) {
        const uintptr_t at = __shfl_sync(~0u, from, kValues * kStep + min(i + row, last));
        CopyAsync((to ^ (i % 8 * sizeof(uint4))) + i * kDim * sizeof(Bf16),
                  reinterpret_cast<const uint4*>(at) + vector, vector * kVector < p_.dim);
      }
    }
    Commit();
  }

 private:
  // The table's entry is asked for a step before it is used.
  __device__ __forceinline__ void Locate() {
    if (in_page_ >= p_.cache.page_tokens) {
      const int pages = in_page_ / p_.cache.page_tokens;
      in_page_ -= pages * p_.cache.page_tokens;
      slot_ = (slot_ + pages) % p_.cache.slots;
    }
    const int j = j_ + static_cast<int>(threadIdx.x % kStep);
    const bool values = threadIdx.x % kWarp >= kStep;
    unit_ = 0;
    if (j >= start_) {
      const int64_t r = flight_ + j - start_;
      base_ = static_cast<const std::byte*>(values ? p_.value : p_.key) +
              sizeof(Bf16) * (values ? r * p_.value_row + kv_head_ * p_.value_head
                                     : r * p_.key_row + kv_head_ * p_.key_head);
      return;
    }
    base_ = p_.cache.arena + (values ? p_.cache.value_offset : p_.cache.key_offset) +
            sizeof(Bf16) * (int64_t{kv_head_} * p_.cache.page_tokens + in_page_) * p_.dim;
    if (j < end_) unit_ = p_.cache.table[sequence_ * p_.cache.table_stride + slot_];
  }

  const Piece& p_;
  int sequence_, start_, flight_, kv_head_;
  int j_, end_, slot_, in_page_;
  const std::byte* base_;
  int32_t unit_;
};

// Of a product's sum a lane has a row (and that 8 below) and two columns, as tensor_cores.cuh says.
struct StepScores {
  float product[2][2][4] = {};  // [even and odd tiles, halves of the keys]: [heads, keys]
};

template <int kDim>
struct WarpAttention {
  static constexpr int kTiles = kDim / 16;

  uint32_t query[kTiles][4];  // high and low parts of heads are rows that a lane has both of
  float sum[kTiles][4] = {};  // [channels, heads]
  float highest = -INFINITY, total = 0;  // of head lane / 4; the total of this lane's keys
  uint32_t high[2], low[2];              // the step's probabilities

  __device__ __forceinline__ WarpAttention(const Piece& p, const Item& item) {
    const int head = Lane() / 4, column = Lane() % 4 * 2;
    float2 channels[kTiles][2];
    const float* from = p.query + (p.first_row + item.row) * p.query_row +
                        (item.first_head + min(head, item.heads - 1)) * p.query_head;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int d = min(16 * t + 8 * half + column, p.dim - 2);
        channels[t][half] = *reinterpret_cast<const float2*>(from + d);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool has = head < item.heads && 16 * t + 8 * half + column < p.dim;
        const float scale = has ? p.scale : 0.0f;
        SplitBf16(channels[t][half].x * scale, channels[t][half].y * scale, &query[t][2 * half],
                  &query[t][2 * half + 1]);
      }
    }
  }

  __device__ __forceinline__ StepScores Score(uint32_t keys) const {
    StepScores scores;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t key[4];
      LoadMatrices(key, Matrices(keys, t));
      Multiply<Bf16>(scores.product[t % 2][0], query[t], key[0], key[1]);
      Multiply<Bf16>(scores.product[t % 2][1], query[t], key[2], key[3]);
    }
    return scores;
  }

  // The step's keys begin at j; those from item.end on have no weight.
  template <bool kObserve>
  __device__ __forceinline__ void Weigh(const Piece& p, const Item& item, int j,
                                        const StepScores& scores) {
    const int head = Lane() / 4, column = Lane() % 4 * 2;
    float score[4];  // of keys j + Key(0..3)
    const auto Key = [&](int i) { return 8 * (i / 2) + column + i % 2; };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&even)[4] = scores.product[0][i / 2], (&odd)[4] = scores.product[1][i / 2];
      score[i] = even[i % 2] + odd[i % 2] + (even[i % 2 + 2] + odd[i % 2 + 2]);
    }
    if (p.softcap > 0) {
#pragma unroll
      for (float& s : score) s = Cap(s, p.softcap);
    }
    float most = -INFINITY;
    if (kObserve && head < item.heads) {
      float* to = Scores(p, item.row, item.first_head + head) - item.first;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = j + Key(2 * half);
        if (at + 1 < item.end) {
          *reinterpret_cast<float2*>(to + at) = {score[2 * half], score[2 * half + 1]};
        } else if (at < item.end) {
          to[at] = score[2 * half];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (j + Key(i) >= item.end) score[i] = -INFINITY;
      most = fmaxf(most, score[i]);
    }
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
    most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
    if (__any_sync(~0u, most > highest)) {
      most = fmaxf(most, highest);
      const float rescale = __expf(highest - most);
      highest = most;
      total *= rescale;
      Rescale(rescale);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float weight[2] = {__expf(score[2 * half] - highest),
                               __expf(score[2 * half + 1] - highest)};
      total += weight[0] + weight[1];
      SplitBf16(weight[0], weight[1], &high[half], &low[half]);
    }
  }

  __device__ __forceinline__ void AddValues(uint32_t values) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t value[4];
      LoadTransposed(value, Matrices(values, t));
      Multiply<Bf16>(sum[t], value, high[0], high[1]);
      Multiply<Bf16>(sum[t], value, low[0], low[1]);
    }
  }

  // After the last step: the total is that of all keys.
  __device__ __forceinline__ void AddLanes() {
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
  }
  // `by`: of head lane / 4.
  __device__ __forceinline__ void Rescale(float by) {
    const float of[2] = {__shfl_sync(~0u, by, Lane() % 4 * 8),
                         __shfl_sync(~0u, by, Lane() % 4 * 8 + 4)};
#pragma unroll
    for (auto& four : sum) {
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] *= of[i % 2];
    }
  }
  // Calls visit(head, channel, its sum) for all that this lane has.
  template <class Visit>
  __device__ __forceinline__ void VisitSums(const Visit& visit) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          visit(Lane() % 4 * 2 + i, 16 * t + 8 * half + Lane() / 4, sum[t][2 * half + i]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int Lane() { return threadIdx.x % kWarp; }
  // Of four 8 x 8 matrices, here 16 keys of 16 channels, a lane points to a row.
  static __device__ __forceinline__ uint32_t Matrices(uint32_t stage, int tile) {
    const int row = Lane() % 8 + Lane() / 16 * 8;
    const uint32_t at = row * kDim * sizeof(Bf16) + ((Lane() / 8 % 2) ^ (Lane() % 8)) * 16;
    return ((stage + at) ^ (tile % 4 * 2 * 16)) + tile / 4 * 8 * 16;
  }
};

}  // namespace longspan::cuda
