// The GPU's draws against the CPU's: the same token from the same logits, knobs and uniform.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/backend.h"

namespace longspan {
namespace {

struct Case {
  int vocab = 0;
  std::vector<float> logits;  // [rows, vocab]
  std::vector<Draw> draws;
  std::vector<LogitEdit> edits;

  int rows() const { return static_cast<int>(logits.size()) / vocab; }
};

std::vector<int32_t> DrawOn(Backend& backend, const Case& c) {
  const auto upload = [&](const void* data, size_t bytes) {
    Buffer buffer = backend.Allocate(std::max<size_t>(bytes, 1));
    backend.CopyIn(buffer.data(), data, bytes);
    return buffer;
  };
  const size_t count = c.draws.size();
  const Buffer logits = upload(c.logits.data(), c.logits.size() * sizeof(float)),
               draws = upload(c.draws.data(), count * sizeof(Draw)),
               edits = upload(c.edits.data(), c.edits.size() * sizeof(LogitEdit)),
               tokens = backend.Allocate(count * sizeof(int32_t));
  SampleArgs args;
  args.logits = View::Matrix(logits.data(), DType::kF32, c.rows(), c.vocab);
  args.draws = reinterpret_cast<const Draw*>(draws.data());
  args.edits = reinterpret_cast<const LogitEdit*>(edits.data());
  args.tokens = View::Vector(tokens.data(), DType::kI32, static_cast<int64_t>(count));
  backend.Run(backend.ops().Sample, args);
  std::vector<int32_t> result(count);
  backend.CopyOut(result.data(), tokens.data(), count * sizeof(int32_t));
  std::vector<float> after(c.logits.size());
  backend.CopyOut(after.data(), logits.data(), after.size() * sizeof(float));
  EXPECT_EQ(std::memcmp(after.data(), c.logits.data(), after.size() * sizeof(float)), 0)
      << "the logits were modified";
  EXPECT_EQ(backend.Fault(), "");
  return result;
}

class CudaSample : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    gpu_ = Backend::Cuda({}, &why);
    if (gpu_ == nullptr) GTEST_SKIP() << why;
    cpu_ = Backend::Cpu({.threads = 4});
  }

  // Weights differ by some 1e-7 of themselves between the two, so that a uniform within that of a
  // border between two tokens may fall to either. The seeds are fixed: none of these does.
  void ExpectSame(const Case& c) {
    const std::vector<int32_t> got = DrawOn(*gpu_, c), expected = DrawOn(*cpu_, c);
    int different = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (got[i] == expected[i] || ++different > 5) continue;
      const Draw& d = c.draws[i];
      ADD_FAILURE() << "draw " << i << " of " << got.size() << ", vocabulary " << c.vocab << ": "
                    << got[i] << " instead of " << expected[i] << "; inverse temperature "
                    << d.inverse_temperature << ", top_k " << d.top_k << ", top_p " << d.top_p
                    << ", min_p margin " << d.min_p_margin << ", uniform " << d.uniform;
    }
    EXPECT_EQ(different, 0);
    EXPECT_EQ(DrawOn(*gpu_, c), got) << "a draw does not repeat";
  }

  std::unique_ptr<Backend> gpu_, cpu_;
};

Case RandomCase(int vocab, int rows, int draws, unsigned seed, float spread) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  Case c;
  c.vocab = vocab;
  c.logits.resize(static_cast<size_t>(rows) * vocab);
  for (float& x : c.logits) x = normal(random);
  std::uniform_real_distribution<double> uniform(0, 1);
  const auto below = [&](int n) { return static_cast<int>(random() % n); };
  for (int i = 0; i < draws; ++i) {
    Draw& d = c.draws.emplace_back();
    d.row = below(rows);
    d.uniform = uniform(random);
    d.inverse_temperature = below(5) == 0 ? 0 : std::exp(static_cast<float>(below(5)) - 2);
    if (below(3) == 0) d.top_k = 1 + below(std::max(1, vocab));
    if (below(3) == 0) d.top_k = 1 + below(std::min(vocab, 50));
    if (below(2) == 0) d.top_p = 0.05f + 0.94f * static_cast<float>(uniform(random));
    if (below(3) == 0)
      d.min_p_margin = std::log(0.001 + 0.3 * uniform(random)) / d.inverse_temperature;
    d.edit_begin = static_cast<int32_t>(c.edits.size());
    if (below(3) == 0) {
      for (int token = below(7); token < vocab; token += 1 + below(vocab)) {
        c.edits.push_back({.token = token, .bias = static_cast<float>(below(9)) - 4});
      }
    }
    if (below(3) == 0) {
      d.presence_penalty = 0.5f;
      d.frequency_penalty = 0.25f;
      d.repetition_penalty = 1.3f;
      for (int token = below(3); token < vocab; token += 1 + below(20)) {
        c.edits.push_back({.kind = LogitEdit::Kind::kPenalty, .token = token, .count = below(4)});
      }
    }
    if (below(3) == 0) c.edits.push_back({.kind = LogitEdit::Kind::kBan, .token = below(vocab)});
    d.edit_end = static_cast<int32_t>(c.edits.size());
  }
  return c;
}

TEST_F(CudaSample, DrawsTheCpusTokenWhateverTheKnobs) {
  ExpectSame(RandomCase(1, 3, 64, 1, 3));
  ExpectSame(RandomCase(2, 3, 256, 2, 3));
  ExpectSame(RandomCase(33, 5, 512, 3, 2));
  ExpectSame(RandomCase(1000, 8, 1024, 4, 3));
  ExpectSame(RandomCase(8192, 8, 1024, 5, 3));
  ExpectSame(RandomCase(50257, 4, 256, 6, 2));
}

TEST_F(CudaSample, DrawsTheCpusTokenFromLargeVocabularies) {
  ExpectSame(RandomCase(262144, 4, 300, 7, 2.5f));  // more draws than the workspace has rows
  ExpectSame(RandomCase(262208, 2, 64, 8, 0.3f));
}

// Half of the logits share a few values: borders fall among equals.
TEST_F(CudaSample, TiesAtABorderGoAsOnTheCpu) {
  Case c = RandomCase(5000, 4, 512, 9, 1);
  for (size_t i = 0; i < c.logits.size(); ++i) c.logits[i] = std::round(c.logits[i]);
  ExpectSame(c);
}

TEST_F(CudaSample, LogitsThatAreNotFiniteAreNeverDrawn) {
  Case c = RandomCase(300, 4, 256, 10, 2);
  for (size_t i = 0; i < c.logits.size(); i += 3) {
    c.logits[i] = i % 2 == 0 ? std::numeric_limits<float>::quiet_NaN()
                             : std::numeric_limits<float>::infinity() * (i % 4 == 1 ? 1 : -1);
  }
  ExpectSame(c);
  std::fill(c.logits.begin(), c.logits.end(), std::numeric_limits<float>::quiet_NaN());
  ExpectSame(c);
}

TEST_F(CudaSample, ExtremeTemperaturesAreHarmless) {
  Case c = RandomCase(1000, 2, 64, 11, 3);
  for (size_t i = 0; i < c.draws.size(); ++i) {
    c.draws[i].inverse_temperature = i % 2 == 0 ? std::numeric_limits<float>::max() : 0.01f;
    c.draws[i].min_p_margin = -std::numeric_limits<double>::infinity();
  }
  ExpectSame(c);
}

}  // namespace
}  // namespace longspan
