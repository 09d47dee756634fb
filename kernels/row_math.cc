#include "kernels/row_math.h"

#include <algorithm>
#include <cstring>
#include <functional>

namespace longspan {
namespace {

// GNU vectors: gcc and clang both lower them to the target's own.
using Floats = float __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));
constexpr int kLanes = 4;

Floats Splat(float x) { return Floats{x, x, x, x}; }
Floats Load(const float* x) {
  Floats v;
  std::memcpy(&v, x, sizeof(v));
  return v;
}
void Store(float* x, Floats v) { std::memcpy(x, &v, sizeof(v)); }
Floats Select(Ints mask, Floats yes, Floats no) {
  return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no));
}
Floats Max(Floats a, Floats b) { return Select(a > b, a, b); }

// exp(x) for x <= 0; 0 below -87. Range reduction by ln 2 in two parts, then exp's series to x^6.
Floats Exp(Floats x) {
  const Ints tiny = x < Splat(-87.0f);
  x = Max(x, Splat(-87.0f));
  const Floats magic = Splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (x * Splat(1.44269504f) + magic) - magic;
  const Floats r = (x - n * Splat(0.693359375f)) - n * Splat(-2.12194440e-4f);
  Floats p = Splat(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + Splat(c);
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  return Select(tiny, Splat(0), p * (Floats)exponent);
}

float Sum(Floats v) { return (v[0] + v[1]) + (v[2] + v[3]); }

}  // namespace

void LoadBlock(std::span<const float> row, int64_t block, float* out) {
  const int64_t begin = block * kRowBlock;
  const int64_t count = std::min<int64_t>(kRowBlock, row.size() - begin);
  const float* x = row.data() + begin;
  if (count < kRowBlock) {
    std::fill(out, out + kRowBlock, kNoLogit);
    std::copy(x, x + count, out);
    x = out;
  }
  const Floats largest = Splat(std::numeric_limits<float>::max());
  for (int i = 0; i < kRowBlock; i += kLanes) {
    const Floats v = Load(x + i);
    Store(out + i, Select(v <= largest, v, Splat(kNoLogit)));  // false for NaN too
  }
}

float BlockMax(std::span<const float> row, int64_t block) {
  const float* x = row.data() + block * kRowBlock;
  float padded[kRowBlock];
  if (static_cast<int64_t>(row.size()) - block * kRowBlock < kRowBlock) {
    LoadBlock(row, block, padded);
    x = padded;
  }
  const Floats largest = Splat(std::numeric_limits<float>::max());
  Floats highest[4];  // four chains: in one, each comparison would wait for the last
  for (Floats& h : highest) h = Splat(kNoLogit);
  for (int i = 0; i < kRowBlock; i += 4 * kLanes) {
    for (int j = 0; j < 4; ++j) {
      const Floats v = Load(x + i + j * kLanes);
      highest[j] = Select((v > highest[j]) & (v <= largest), v, highest[j]);
    }
  }
  const Floats all = Max(Max(highest[0], highest[1]), Max(highest[2], highest[3]));
  return std::max(std::max(all[0], all[1]), std::max(all[2], all[3]));
}

float BlockWeights(const float* x, float highest, float scale, float floor, float* weights) {
  Floats sum = Splat(0);
  for (int i = 0; i < kRowBlock; i += kLanes) {
    const Floats v = Load(x + i);
    const Floats w = Select(v >= Splat(floor), Exp((v - Splat(highest)) * Splat(scale)), Splat(0));
    Store(weights + i, w);
    sum += w;
  }
  return Sum(sum);
}

std::pair<float, int32_t> RowMax(std::span<const float> row) {
  float highest = kNoLogit;
  int64_t best = -1;
  for (int64_t b = 0; b < RowBlocks(row); ++b) {
    const float m = BlockMax(row, b);
    if (m > highest) {
      highest = m;
      best = b;
    }
  }
  if (best < 0) return {kNoLogit, -1};
  float x[kRowBlock];
  LoadBlock(row, best, x);
  const auto index = std::find(x, x + kRowBlock, highest) - x;
  return {highest, static_cast<int32_t>(best * kRowBlock + index)};
}

double RowSum(std::span<const float> row, float highest, float scale) {
  float x[kRowBlock], w[kRowBlock];
  double sum = 0;
  for (int64_t b = 0; b < RowBlocks(row); ++b) {
    LoadBlock(row, b, x);
    sum += BlockWeights(x, highest, scale, kNoLogit, w);
  }
  return sum;
}

int32_t RowRank(std::span<const float> row, int32_t index) {
  float x[kRowBlock];
  const int64_t own = index / kRowBlock;
  LoadBlock(row, own, x);
  const float value = x[index % kRowBlock];
  Ints before = {0, 0, 0, 0};
  for (int64_t b = 0; b < RowBlocks(row); ++b) {
    LoadBlock(row, b, x);
    // Ties count in the blocks before its own; there, up to `index`.
    const Ints ties = b < own ? ~Ints{0, 0, 0, 0} : Ints{0, 0, 0, 0};
    for (int i = 0; i < kRowBlock; i += kLanes) {
      const Floats v = Load(x + i);
      before -= (v > Splat(value)) | ((v == Splat(value)) & ties);
    }
    if (b == own) before[0] += std::count(x, x + index % kRowBlock, value);
  }
  return before[0] + before[1] + before[2] + before[3];
}

namespace {

// Writes the maximum of each block to maxima[0, blocks) and returns a value that none of the
// `count` largest is below. maxima: [2 * blocks].
float FloorOfTop(std::span<const float> row, int64_t count, float* maxima) {
  const int64_t blocks = RowBlocks(row);
  for (int64_t b = 0; b < blocks; ++b) maxima[b] = BlockMax(row, b);
  // `count` blocks have a value of at least the count-th largest maximum.
  if (count > blocks) return kNoLogit;
  float* order = maxima + blocks;
  std::copy(maxima, maxima + blocks, order);
  std::nth_element(order, order + (count - 1), order + blocks, std::greater<float>());
  return order[count - 1];
}

// Calls take(value, index) with each finite value of at least `floor`, in order.
template <class Take>
void ForEachAtLeast(std::span<const float> row, float floor, const float* maxima, Take take) {
  for (int64_t b = 0; b < RowBlocks(row); ++b) {
    if (maxima[b] < floor || maxima[b] == kNoLogit) continue;
    float x[kRowBlock];
    LoadBlock(row, b, x);
    for (int i = 0; i < kRowBlock; ++i) {
      if (x[i] >= floor && x[i] != kNoLogit) take(x[i], static_cast<int32_t>(b * kRowBlock + i));
    }
  }
}

}  // namespace

float RowNth(std::span<const float> row, int64_t count, float* scratch) {
  if (count <= 0) return kNoLogit;
  float* maxima = scratch;
  float* values = maxima + 2 * RowBlocks(row);
  const float floor = FloorOfTop(row, count, maxima);
  float* end = values;
  ForEachAtLeast(row, floor, maxima, [&](float value, int32_t) { *end++ = value; });
  if (end - values < count) return kNoLogit;
  std::nth_element(values, values + (count - 1), end, std::greater<float>());
  return values[count - 1];
}

void RowTop(std::span<const float> row, int64_t count,
            std::vector<std::pair<float, int32_t>>* out) {
  out->clear();
  if (count <= 0) return;
  std::vector<float> maxima(2 * RowBlocks(row));
  const float floor = FloorOfTop(row, count, maxima.data());
  ForEachAtLeast(row, floor, maxima.data(),
                 [&](float value, int32_t index) { out->emplace_back(value, index); });
  if (static_cast<int64_t>(out->size()) <= count) return;
  std::nth_element(out->begin(), out->begin() + (count - 1), out->end(), MoreLikely);
  const float last = (*out)[count - 1].first;
  out->erase(std::remove_if(out->begin() + count, out->end(),
                            [last](const auto& candidate) { return candidate.first < last; }),
             out->end());
}

}  // namespace longspan
