#include "server/heatmap.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "server/cli_client.h"

namespace longspan {
namespace {

constexpr int kCellWidth = 44, kCellHeight = 28;  // holds "1.00" at 12 px
constexpr int kLeft = 90, kTop = 44, kBottom = 56, kRight = 86;
constexpr size_t kMostWithNumbers = 20;  // rows or columns; beyond it numbers are clutter

std::string Hex(double value) {
  if (std::isnan(value)) return "#d9d9d9";
  const cli::Rgb c = cli::HeatColour(value);
  return absl::StrFormat("#%02x%02x%02x", c.red, c.green, c.blue);
}

std::string TextAt(double x, double y, const char* anchor, const std::string& text,
                   const char* extra = "") {
  return absl::StrFormat("<text x=\"%g\" y=\"%g\" text-anchor=\"%s\"%s>%s</text>\n", x, y, anchor,
                         extra, EscapeXml(text));
}

std::string Cells(const HeatMap& map) {
  const bool numbers =
      map.rows.size() <= kMostWithNumbers && map.columns.size() <= kMostWithNumbers;
  std::string out;
  for (size_t r = 0; r < map.rows.size(); ++r) {
    for (size_t c = 0; c < map.columns.size(); ++c) {
      const double value = map.at(r, c);
      const int x = kLeft + static_cast<int>(c) * kCellWidth;
      const int y = kTop + static_cast<int>(r) * kCellHeight;
      const std::string shown = std::isnan(value) ? "no value" : absl::StrFormat("%.3f", value);
      absl::StrAppendFormat(
          &out,
          "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"%s\"><title>%s, %s: %s</title>"
          "</rect>\n",
          x, y, kCellWidth, kCellHeight, Hex(value), EscapeXml(map.rows[r]),
          EscapeXml(map.columns[c]), shown);
      if (numbers && !std::isnan(value)) {
        out += TextAt(x + kCellWidth / 2.0, y + 18, "middle", absl::StrFormat("%.2f", value),
                      value < 0.6 ? " fill=\"#fff\"" : " fill=\"#000\"");
      }
    }
  }
  return out;
}

std::string ScaleBar(int x, int height) {
  std::string out;
  constexpr int kSteps = 20;
  for (int i = 0; i < kSteps; ++i) {
    const double step = static_cast<double>(height) / kSteps;
    absl::StrAppendFormat(&out,
                          "<rect x=\"%d\" y=\"%g\" width=\"14\" height=\"%g\" fill=\"%s\"/>\n", x,
                          kTop + i * step, step + 0.5, Hex(1 - (i + 0.5) / kSteps));
  }
  out += TextAt(x + 20, kTop + 10, "start", "1");
  out += TextAt(x + 20, kTop + height, "start", "0");
  return out;
}

}  // namespace

std::vector<std::string> DrawText(const HeatMap& map, bool colour) {
  size_t label = map.row_title.size(), column = 2;
  for (const std::string& row : map.rows) label = std::max(label, row.size());
  for (const std::string& name : map.columns) column = std::max(column, name.size() + 1);
  std::vector<std::string> lines;
  for (size_t r = 0; r < map.rows.size(); ++r) {
    std::string line = std::string(label - map.rows[r].size(), ' ') + map.rows[r] + " ";
    for (size_t c = 0; c < map.columns.size(); ++c) {
      const double value = map.at(r, c);
      if (!colour || std::isnan(value)) {
        line += std::string(column - 2, ' ') + cli::HeatCell(value, false);
      } else {
        const cli::Rgb rgb = cli::HeatColour(value);
        absl::StrAppendFormat(&line, "\033[48;2;%d;%d;%dm%s\033[0m", rgb.red, rgb.green, rgb.blue,
                              std::string(column, ' '));
      }
    }
    lines.push_back(std::move(line));
  }
  std::string names = std::string(label - map.row_title.size(), ' ') + map.row_title + " ";
  for (const std::string& name : map.columns) {
    names += std::string(column - name.size(), ' ') + name;
  }
  lines.push_back(std::move(names));
  return lines;
}

std::string DrawSvg(const HeatMap& map) {
  const int grid_width = static_cast<int>(map.columns.size()) * kCellWidth;
  const int grid_height = static_cast<int>(map.rows.size()) * kCellHeight;
  const int width = kLeft + grid_width + kRight, height = kTop + grid_height + kBottom;
  std::string out = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" viewBox=\"0 0 %d %d\" "
      "font-family=\"sans-serif\" font-size=\"12\" role=\"img\">\n",
      width, height, width, height);
  absl::StrAppend(&out, "<title>", EscapeXml(map.title), "</title>\n");
  absl::StrAppendFormat(&out, "<rect width=\"%d\" height=\"%d\" fill=\"#fff\"/>\n", width, height);
  out += TextAt(kLeft, 24, "start", map.title, " font-size=\"15\"");
  out += Cells(map);
  for (size_t r = 0; r < map.rows.size(); ++r) {
    out += TextAt(kLeft - 6, kTop + static_cast<int>(r) * kCellHeight + 18, "end", map.rows[r]);
  }
  for (size_t c = 0; c < map.columns.size(); ++c) {
    out += TextAt(kLeft + (static_cast<double>(c) + 0.5) * kCellWidth, kTop + grid_height + 16,
                  "middle", map.columns[c]);
  }
  out += TextAt(kLeft + grid_width / 2.0, kTop + grid_height + 38, "middle", map.column_title);
  const double middle = kTop + grid_height / 2.0;
  out += TextAt(16, middle, "middle", map.row_title,
                absl::StrFormat(" transform=\"rotate(-90 16 %g)\"", middle).c_str());
  out += ScaleBar(kLeft + grid_width + 24, grid_height);
  return out + "</svg>\n";
}

std::string EscapeXml(const std::string& text) {
  std::string out = absl::StrReplaceAll(
      text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}, {"\"", "&quot;"}, {"'", "&#39;"}});
  // XML has no way to write other control characters.
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 && c != '\n' && c != '\t') c = ' ';
  }
  return out;
}

}  // namespace longspan
