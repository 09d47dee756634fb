#pragma once
// What an attention case's answer and spans must equal: the eager answer in doubles.
#include <gtest/gtest.h>

#include "tests/support/attention_case.h"

namespace longspan::testing {

inline void ExpectRowEqualsEager(const AttentionCase& c, double tolerance, size_t s, int t) {
  const AttentionShape& shape = c.shape();
  for (int h = 0; h < shape.heads; ++h) {
    const auto answer = c.Eager(static_cast<int>(s), t, h);
    for (int d = 0; d < shape.dim; ++d) {
      ASSERT_NEAR(c.out()[s][(static_cast<size_t>(t) * shape.heads + h) * shape.dim + d],
                  answer.out[d], tolerance)
          << "sequence " << s << " position " << t << " head " << h << " channel " << d;
    }
  }
}
// Every `every`th row of each sequence.
inline void ExpectEqualsEager(const AttentionCase& c, double tolerance, int every = 1) {
  for (size_t s = 0; s < c.lengths().size(); ++s) {
    for (int t = 0; t < c.lengths()[s]; t += every) {
      ASSERT_NO_FATAL_FAILURE(ExpectRowEqualsEager(c, tolerance, s, t));
    }
  }
}
inline void ExpectLastRowsEqualEager(const AttentionCase& c, double tolerance) {
  for (size_t s = 0; s < c.lengths().size(); ++s) {
    ASSERT_NO_FATAL_FAILURE(ExpectRowEqualsEager(c, tolerance, s, c.lengths()[s] - 1));
  }
}

inline void ExpectSpansEqualEager(const AttentionCase& c, const std::vector<ProbeRange>& probes,
                                  double tolerance, int every) {
  const AttentionShape& shape = c.shape();
  for (size_t s = 0; s < c.lengths().size(); ++s) {
    for (int t = 0; t < c.lengths()[s]; t += every) {
      for (int h = 0; h < shape.heads; ++h) {
        const std::vector<double> p = c.Eager(static_cast<int>(s), t, h).p;
        double far = 0, sink = 0, distance = 0, entropy = 0, top = -1, probe = 0;
        double buckets[kDistanceBuckets] = {};
        int top_key = 0;
        for (int j = 0; j <= t; ++j) {
          const int back = t - j;
          if (j < kSinkTokens) sink += p[j];
          if (j >= kSinkTokens) distance += p[j] * back;
          if (j >= kSinkTokens && back >= shape.far_window) far += p[j];
          if (p[j] > 0) entropy -= p[j] * std::log(p[j]);
          if (p[j] > top) top = p[j], top_key = j;
          for (const ProbeRange& r : probes) {
            if (j >= r.begin && j < r.end) {
              probe += p[j];
              break;
            }
          }
          int bucket = 0;
          while (back >= (1 << bucket)) ++bucket;
          buckets[bucket] += p[j];
        }
        double seen = 0;
        for (double x : p) seen += x;
        const SpanRecord& r = c.records()[s][static_cast<size_t>(t) * shape.heads + h];
        EXPECT_NEAR(r.far_mass, far, tolerance);
        EXPECT_NEAR(r.sink_mass, sink, tolerance);
        // Relative: distances reach the context's length; near 1 - sink = 0 the division amplifies.
        if (seen - sink > 1e-6) {
          EXPECT_NEAR(r.distance, distance / (seen - sink), 1e-3 * (1 + t));
        }
        EXPECT_NEAR(r.entropy, t > 0 ? entropy / std::log(t + 1.0) : 0, tolerance);
        EXPECT_NEAR(r.top_probability, top, tolerance);
        EXPECT_EQ(r.top_key, top_key);
        EXPECT_NEAR(r.probe_mass, probe, tolerance);
        EXPECT_EQ(r.beyond_window, 0.0f);
        for (int b = 0; b < kDistanceBuckets; ++b)
          EXPECT_NEAR(r.mass_by_distance[b], buckets[b], tolerance);
        if (::testing::Test::HasFailure()) FAIL() << "position " << t << " head " << h;
      }
    }
  }
}

// In steps of one row a sequence a ring never loses what the row sees, so that it may be written
// before attention reads it.
inline void ExpectStoringFirstChangesNoBit(Backend& backend, AttentionShape shape) {
  for (int window : {0, 1, 5, 16, 17, 40}) {
    shape.window = window;
    AttentionCase c(shape, {100, 1, 57});
    c.RunAll(backend, 1, /*observe=*/true);
    const auto out = c.out();
    const auto records = c.records();
    c.stores_first = true;
    c.RunAll(backend, 1, /*observe=*/true);
    EXPECT_EQ(c.out(), out) << "window " << window;
    for (size_t s = 0; s < records.size(); ++s) {
      ASSERT_EQ(c.records()[s].size(), records[s].size());
      EXPECT_EQ(std::memcmp(c.records()[s].data(), records[s].data(),
                            records[s].size() * sizeof(SpanRecord)),
                0)
          << "window " << window;
    }
  }
}

}  // namespace longspan::testing
