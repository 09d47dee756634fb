#include "server/needle_report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/support/paths.h"

namespace longspan {
namespace {

NeedleReport Sample() {
  NeedleReport report;
  report.run_id = "needle-1";
  report.model = "m<o>del & \"co\"";
  report.version = "0.1.0";
  report.request.add_context_lengths(1024);
  report.request.add_context_lengths(1500);
  report.request.add_depth_percents(0);
  report.request.add_depth_percents(33.333333f);
  report.request.set_trials(2);
  report.request.set_seed(1ull << 60);
  for (uint32_t i = 0; i < 8; ++i) {
    v1::NeedleCell cell;
    cell.set_trial(i / 4);
    cell.set_length_index(i / 2 % 2);
    cell.set_depth_index(i % 2);
    cell.set_context_length(report.request.context_lengths(static_cast<int>(cell.length_index())));
    cell.set_depth_percent(report.request.depth_percents(static_cast<int>(cell.depth_index())));
    cell.set_score(i == 3 ? 0.f : 1.f);
    cell.set_prompt_tokens(1000);
    cell.set_needle_token_end(cell.depth_index() == 0 ? 500 : 950);
    cell.set_expected("1234567");
    cell.set_answer(i == 3 ? "</script><b>&\x01 nothing" : "1234567");
    v1::LayerNeedleMass* layer = cell.add_layers();
    layer->set_layer(5);
    layer->set_kind(v1::LAYER_KIND_FULL);
    layer->add_head_mass(0.9f);
    layer->add_head_mass(0.05f);
    report.cells.push_back(cell);
  }
  return report;
}

// Every element is closed in order, attributes are quoted, no stray '<' or '&'.
::testing::AssertionResult WellFormed(const std::string& xml) {
  std::vector<std::string> open;
  for (size_t i = 0; i < xml.size(); ++i) {
    if (xml[i] == '&') {
      const size_t end = xml.find(';', i);
      if (end == std::string::npos || end - i > 6) {
        return ::testing::AssertionFailure() << "stray & at " << xml.substr(i, 40);
      }
    }
    if (xml[i] != '<') continue;
    const size_t end = xml.find('>', i);
    if (end == std::string::npos) return ::testing::AssertionFailure() << "unclosed tag";
    const std::string tag = xml.substr(i + 1, end - i - 1);
    i = end;
    if (absl::StartsWith(tag, "!")) continue;
    const std::string name = tag.substr(0, tag.find_first_of(" \n/", 1));
    if (tag.find('<') != std::string::npos || std::count(tag.begin(), tag.end(), '"') % 2 != 0) {
      return ::testing::AssertionFailure() << "broken tag " << tag;
    }
    if (tag[0] == '/') {
      if (open.empty() || "/" + open.back() != tag) {
        return ::testing::AssertionFailure() << "</" << tag << "> closes nothing";
      }
      open.pop_back();
    } else if (tag.back() != '/') {
      open.push_back(name);
    }
  }
  if (!open.empty()) return ::testing::AssertionFailure() << open.back() << " is not closed";
  return ::testing::AssertionSuccess();
}

// Values from the formula's published worked examples: 95 % score intervals of 0/10, 5/10, 8/10,
// 10/10, and 15/148 of Newcombe (1998), table I.
TEST(WilsonInterval, EqualsPublishedValues) {
  struct Case {
    double successes;
    int n;
    double low, high;
  };
  for (const Case& c :
       {Case{0, 10, 0, 0.2775}, Case{5, 10, 0.2366, 0.7634}, Case{8, 10, 0.4902, 0.9433},
        Case{10, 10, 0.7225, 1}, Case{15, 148, 0.0624, 0.1605}, Case{81, 263, 0.2553, 0.3662}}) {
    const Interval got = Wilson(c.successes, c.n);
    EXPECT_NEAR(got.low, c.low, 1e-4) << c.successes << "/" << c.n;
    EXPECT_NEAR(got.high, c.high, 1e-4) << c.successes << "/" << c.n;
  }
  EXPECT_EQ(Wilson(0, 0).low, 0);
  EXPECT_EQ(Wilson(0, 0).high, 1);
}

TEST(NeedleReport, MeansLeaveOutCellsWithErrors) {
  NeedleReport report = Sample();
  report.cells[0].set_error("UNAVAILABLE: gone");
  EXPECT_EQ(Overall(report).n, 7);
  EXPECT_NEAR(Overall(report).mean, 6 / 7.0, 1e-12);
  EXPECT_NEAR(ByLength(report)[1].mean, 0.75, 1e-12);
  EXPECT_EQ(ByDepth(report)[0].n, 3);
  const auto worst = WorstCells(report);
  ASSERT_EQ(worst.size(), 2u);
  EXPECT_EQ(worst[0]->error(), "UNAVAILABLE: gone");
}

TEST(NeedleReport, NamesTheHeadsAboveTheThreshold) {
  const auto heads = HeadsByMass(Sample());
  ASSERT_EQ(heads.size(), 2u);
  EXPECT_EQ(heads[0].head, 0u);
  EXPECT_NEAR(heads[0].mass, 0.9, 1e-6);
  const std::string text = ReportText(Sample(), 3);
  EXPECT_NE(text.find("layer 5  full     head 0   0.900"), std::string::npos) << text;
  EXPECT_NE(text.find("largest of the other full heads: 0.050"), std::string::npos) << text;
}

TEST(NeedleReport, CountsNoHeadForANeedleWithinTwoWindows) {
  NeedleReport report = Sample();
  report.window = 64;
  for (v1::NeedleCell& cell : report.cells) {
    const bool near = cell.needle_token_end() == 950;  // 50 tokens before the answer
    cell.mutable_layers(0)->set_head_mass(1, near ? 1.f : 0.f);
  }
  for (const HeadMass& head : HeadsByMass(report)) {
    EXPECT_NEAR(head.mass, head.head == 0 ? 0.9 : 0, 1e-6);
  }
}

TEST(NeedleReport, SvgAndHtmlAreWellFormedWhateverTheModelSays) {
  EXPECT_TRUE(WellFormed(DrawSvg(ScoreMap(Sample()))));
  const std::string html = ReportHtml(Sample());
  EXPECT_EQ(html.find("</script><b>"), std::string::npos);
  EXPECT_EQ(html.find("http://", html.find("<body>")),
            html.find("http://www.w3.org/2000/svg", html.find("<body>")));  // nothing is fetched
  // Styles and JSON hold no markup, so the whole page can be read as XML.
  EXPECT_TRUE(WellFormed(html));
  NeedleReport empty;
  EXPECT_TRUE(WellFormed(ReportHtml(empty)));
}

TEST(NeedleReport, IsReadBackAsItWasWritten) {
  const std::string folder = testing::TempDir() + "/run";
  NeedleReport report = Sample();
  report.cells.resize(5);
  ASSERT_TRUE(WriteReport(folder, report).ok());
  ASSERT_TRUE(AppendCell(folder, Sample().cells[5]).ok());
  {
    std::ofstream torn(folder + "/results.jsonl", std::ios::app);
    torn << "{\"length_index\":1,\"depth_in";
  }
  auto loaded = LoadReport(folder, report.request);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  ASSERT_EQ(loaded->cells.size(), 6u);
  EXPECT_EQ(loaded->cells[3].answer(), report.cells[3].answer());
  for (const char* file : {"results.jsonl", "summary.json", "heatmap.svg", "report.html"}) {
    EXPECT_TRUE(std::filesystem::exists(folder + "/" + file)) << file;
  }
}

TEST(NeedleReport, CellsWithErrorsAreRunAgain) {
  const std::string folder = testing::TempDir() + "/run";
  NeedleReport report = Sample();
  report.cells[2].set_error("UNAVAILABLE: gone");
  ASSERT_TRUE(WriteReport(folder, report).ok());
  auto loaded = LoadReport(folder, report.request);
  ASSERT_TRUE(loaded.ok());
  EXPECT_EQ(loaded->cells.size(), 7u);
}

TEST(NeedleReport, AFolderWithOtherSettingsIsRefusedByName) {
  const std::string folder = testing::TempDir() + "/run";
  ASSERT_TRUE(WriteReport(folder, Sample()).ok());
  v1::RunNeedleRequest other = Sample().request;
  other.set_seed(2);
  const auto loaded = LoadReport(folder, other);
  ASSERT_FALSE(loaded.ok());
  EXPECT_NE(loaded.status().message().find("seed"), std::string::npos) << loaded.status();
  other = Sample().request;
  other.set_concurrency(3);  // decides nothing about the results
  EXPECT_TRUE(LoadReport(folder, other).ok());
}

TEST(NeedleReport, AnEmptyFolderIsANewRun) {
  const auto loaded = LoadReport(testing::TempDir(), Sample().request);
  ASSERT_TRUE(loaded.ok());
  EXPECT_TRUE(loaded->cells.empty());
}

TEST(NeedleReport, SummaryIsJsonWithoutNaN) {
  NeedleReport report = Sample();
  report.cells.clear();
  const auto json = nlohmann::json::parse(SummaryJson(report), nullptr, false);
  ASSERT_TRUE(json.is_object());
  EXPECT_TRUE(json["mean_score"].is_null());
  EXPECT_EQ(json["request"]["context_lengths"][1], 1500);
}

TEST(HeatMap, DigitsAreTenthsAndUnknownIsADot) {
  const HeatMap map = {.title = "t",
                       .row_title = "r",
                       .column_title = "c",
                       .rows = {"0%", "100%"},
                       .columns = {"1k", "2k"},
                       .values = {1, 0.55, 0, std::numeric_limits<double>::quiet_NaN()}};
  const auto lines = DrawText(map, /*colour=*/false);
  ASSERT_EQ(lines.size(), 3u);
  EXPECT_EQ(lines[0], "  0%   *  5");
  EXPECT_EQ(lines[1], "100%   0  .");
  EXPECT_EQ(lines[2], "   r  1k 2k");
  const auto coloured = DrawText(map, /*colour=*/true);
  EXPECT_NE(coloured[0].find("\033[48;2;253;231;37m"), std::string::npos);  // viridis at 1
  EXPECT_NE(coloured[1].find("\033[48;2;68;1;84m"), std::string::npos);     // and at 0
}

}  // namespace
}  // namespace longspan
