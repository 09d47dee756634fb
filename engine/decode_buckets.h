#pragma once
// The sizes that steps which decode come in on a device that launches a repeated step at once
// (Backend::Repeat): few enough to have those of hundreds of sequences ready before the first
// client comes.
#include <vector>

namespace longspan {

// The least size of at least `sequences` (>= 1), at most `most` (>= sequences): each number up to
// 16, of 64 every 8th, of 256 every 32nd, beyond that every 128th, and `most`. Rows that fill a
// step up read one key each.
int DecodeBucket(int sequences, int most);
// All of them, in ascending order.
std::vector<int> DecodeBuckets(int most);

}  // namespace longspan
