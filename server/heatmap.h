#pragma once
// A grid of values from 0 to 1, drawn for a terminal and as SVG.
#include <string>
#include <vector>

namespace longspan {

struct HeatMap {
  std::string title, row_title, column_title;
  std::vector<std::string> rows, columns;  // labels
  std::vector<double> values;              // [rows, columns]; NaN: not known

  double at(size_t row, size_t column) const { return values[row * columns.size() + column]; }
};

// One line per row with its label, then the column labels. 24-bit colour blocks, or digits without
// colour: 0 to 9 for tenths, '*' for a full 1, '.' for what is not known.
std::vector<std::string> DrawText(const HeatMap& map, bool colour);

// A self-contained <svg> element: cells coloured by a perceptual, colour-blind-safe scale
// (viridis), the value in each cell where it fits, labels, a scale bar.
std::string DrawSvg(const HeatMap& map);

std::string EscapeXml(const std::string& text);  // for element content and attribute values

}  // namespace longspan
