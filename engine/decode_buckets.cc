#include "engine/decode_buckets.h"

#include <algorithm>

namespace longspan {

int DecodeBucket(int sequences, int most) {
  const int step = sequences <= 16 ? 1 : sequences <= 64 ? 8 : sequences <= 256 ? 32 : 128;
  return std::min(most, (sequences + step - 1) / step * step);
}

std::vector<int> DecodeBuckets(int most) {
  std::vector<int> buckets;
  for (int n = 1; n <= most; n = buckets.back() + 1) buckets.push_back(DecodeBucket(n, most));
  return buckets;
}

}  // namespace longspan
