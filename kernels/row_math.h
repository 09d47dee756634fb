#pragma once
// Vectorised passes over one row of logits, in blocks of kRowBlock. Compiled for the baseline of
// the target (four lanes), so that results do not depend on the machine. A value that is not finite
// reads as -infinity.
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <span>

namespace longspan {

inline constexpr int kRowBlock = 64;
inline constexpr float kNoLogit = -std::numeric_limits<float>::infinity();

inline int64_t RowBlocks(std::span<const float> row) {
  return (static_cast<int64_t>(row.size()) + kRowBlock - 1) / kRowBlock;
}

// Block `block` of the row, padded with -infinity at its end.
void LoadBlock(std::span<const float> row, int64_t block, float* out);
// Largest finite value of a block of the row; -infinity when there is none.
float BlockMax(std::span<const float> row, int64_t block);
// weights[i] = exp((x[i] - highest) * scale) for x[i] >= floor, else 0; returns their sum. x[i] <=
// highest. Relative error below 3e-7 where the weight exceeds 1e-30.
float BlockWeights(const float* x, float highest, float scale, float floor, float* weights);

// Largest value and the smallest index that has it; {-infinity, -1} when no value is finite.
std::pair<float, int32_t> RowMax(std::span<const float> row);
// Sum of exp((x - highest) * scale) over the row.
double RowSum(std::span<const float> row, float highest, float scale);
// How many values come before (x, index): larger, or equal with a smaller index.
int32_t RowRank(std::span<const float> row, int32_t index);
// The count-th largest finite value; -infinity when there are fewer. scratch: [row.size() + 2 *
// RowBlocks(row)].
float RowNth(std::span<const float> row, int64_t count, float* scratch);
// Appends to *out (cleared first) every finite value that is at least the count-th largest, in no
// order.
void RowTop(std::span<const float> row, int64_t count, std::vector<std::pair<float, int32_t>>* out);

// Larger values first, smaller indices first among equals.
inline bool MoreLikely(const std::pair<float, int32_t>& a, const std::pair<float, int32_t>& b) {
  return a.first != b.first ? a.first > b.first : a.second < b.second;
}

}  // namespace longspan
