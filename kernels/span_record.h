#pragma once
// What an attention op can tell about one query row and head. std only: nvcc compiles this.
//
// p_j are the softmax probabilities of a query at position t over keys j <= t (on window layers
// only j > t - W exist). W below is SpanRequest::far_window, the model's window, on both layer
// kinds. All fields are sums for this one query, never averages. Formulas: Qiao et al., arXiv
// 2606.15378, and Gu et al., arXiv 2410.10781 (sinks).
#include <cstdint>

namespace longspan {

inline constexpr int kSinkTokens = 4;
inline constexpr int kDistanceBuckets = 24;  // bucket 0: distance 0; bucket k: [2^(k-1), 2^k)

struct SpanRecord {
  float far_mass = 0;   // sum of p_j with t - j >= W and j >= kSinkTokens
  float sink_mass = 0;  // sum of p_j with j < kSinkTokens
  float distance =
      0;  // sum of p_j (t - j) over j >= kSinkTokens, divided by (1 - sink_mass); 0 if none
  float entropy = 0;          // -sum p_j ln p_j / ln(t + 1); 0 at t = 0
  float top_probability = 0;  // max p_j
  int32_t top_key = 0;        // the position that has it (the smallest on a tie)
  float probe_mass = 0;       // sum of p_j over SpanRequest's probe ranges of this row
  float beyond_window = 0;    // sum of p_j with t - j >= the layer's own window; exactly 0 or a bug
  float mass_by_distance[kDistanceBuckets] = {};  // sum of p_j by t - j, sinks included
};

// Half-open range of positions whose attention mass a needle run asks for.
struct ProbeRange {
  int32_t begin = 0;
  int32_t end = 0;
};

// Which rows of a step to observe, and where the records go. rows == 0: nothing is observed and the
// attention op does exactly the work that it does without this struct.
struct SpanRequest {
  const int32_t* rows = nullptr;  // [count] ascending query-row indices of the step
  int count = 0;
  const int32_t* host_rows = nullptr;  // the same in host memory; nullptr: rows is
  int far_window = 0;  // W; 0 when the model has no window layer: far_mass is then 0
  const ProbeRange* probes = nullptr;      // ranges of all observed rows, one after another
  const int32_t* probe_offsets = nullptr;  // [count + 1] into probes; nullptr: no probes
  SpanRecord* records = nullptr;           // [count, heads]

  const int32_t* HostRows() const { return host_rows ? host_rows : rows; }
};

}  // namespace longspan
