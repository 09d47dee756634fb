#include "engine/stop_matcher.h"

#include <optional>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace longspan {
namespace {

struct Shown {
  std::string text;
  std::optional<std::string> stop;
};

Shown Feed(const std::vector<std::string>& stops, bool include,
           const std::vector<std::string>& pieces) {
  StopMatcher matcher(stops, include);
  Shown shown;
  for (const std::string& piece : pieces) {
    StopMatcher::Found found = matcher.Append(piece, /*may_stop=*/true);
    shown.text += found.text;
    if (found.stop.has_value()) {
      shown.stop = found.stop;
      return shown;
    }
  }
  shown.text += matcher.Flush();
  return shown;
}

// The law itself: the first byte at which any stop string ends, the longest there.
Shown Reference(const std::vector<std::string>& stops, bool include, const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::optional<std::string> best;
    for (const std::string& stop : stops) {
      const bool ends_here =
          stop.size() <= end && text.compare(end - stop.size(), stop.size(), stop) == 0;
      if (ends_here && (!best.has_value() || stop.size() > best->size())) best = stop;
    }
    if (best.has_value()) return {text.substr(0, include ? end : end - best->size()), best};
  }
  return {text, std::nullopt};
}

TEST(StopMatcher, CutsTheStopStringOrKeepsIt) {
  const Shown without = Feed({"END"}, false, {"one END two"});
  EXPECT_EQ(without.text, "one ");
  EXPECT_EQ(without.stop, "END");
  EXPECT_EQ(Feed({"END"}, true, {"one END two"}).text, "one END");
}

TEST(StopMatcher, HoldsBackWhatMayBecomeAStopString) {
  StopMatcher matcher({"</end>"}, false);
  EXPECT_EQ(matcher.Append("text </", true).text, "text ");
  EXPECT_EQ(matcher.Append("en", true).text, "");
  EXPECT_EQ(matcher.Append("t>", true).text, "</ent>");
  EXPECT_EQ(matcher.Append("<", true).text, "");
  EXPECT_EQ(matcher.Flush(), "<");
}

TEST(StopMatcher, FindsAStopStringAcrossPieces) {
  const Shown shown = Feed({"\n\nQ:"}, false, {"A: yes\n", "\n", "Q", ":", " next"});
  EXPECT_EQ(shown.text, "A: yes");
  EXPECT_EQ(shown.stop, "\n\nQ:");
}

TEST(StopMatcher, NeverSplitsACharacterOfWhatItShows) {
  StopMatcher matcher({"né"}, false);
  EXPECT_EQ(matcher.Append("une n", true).text, "une ");
  EXPECT_EQ(matcher.Append("è", true).text, "nè");
}

TEST(StopMatcher, PassesOverStopStringsThatEndTooEarly) {
  StopMatcher matcher({"stop", "xstopping"}, false);
  EXPECT_EQ(matcher.Append("a stop, xstop", false).text, "a stop, ");
  StopMatcher::Found found = matcher.Append("p", true);  // the earlier "stop" is not found again
  EXPECT_FALSE(found.stop.has_value());
  found = matcher.Append("ed. stop", true);
  EXPECT_EQ(found.text, "xstopped. ");
  EXPECT_EQ(found.stop, "stop");
}

TEST(StopMatcher, StopsAtAStringThatBeganTooEarlyButEndsInTime) {
  StopMatcher matcher({"stop"}, false);
  EXPECT_EQ(matcher.Append("a sto", false).text, "a ");
  EXPECT_EQ(matcher.Append("p", true).stop, "stop");
}

TEST(StopMatcher, EqualsTheByteWiseLawHoweverTextIsCut) {
  std::mt19937 random(7);
  auto below = [&](int n) { return static_cast<int>(random() % n); };
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<std::string> stops(1 + below(4));
    for (std::string& stop : stops) {
      for (int i = 1 + below(5); i > 0; --i) stop += static_cast<char>('a' + below(2));
    }
    std::vector<std::string> pieces(1 + below(12));
    std::string text;
    for (std::string& piece : pieces) {
      for (int i = below(4); i > 0; --i) piece += static_cast<char>('a' + below(3));
      text += piece;
    }
    const bool include = below(2) == 0;
    const Shown expected = Reference(stops, include, text);
    const Shown shown = Feed(stops, include, pieces);
    ASSERT_EQ(shown.text, expected.text) << text;
    ASSERT_EQ(shown.stop, expected.stop) << text;
  }
}

}  // namespace
}  // namespace longspan
