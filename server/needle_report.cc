#include "server/needle_report.h"

#include <google/protobuf/util/json_util.h>
#include <google/protobuf/util/message_differencer.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "server/cli_client.h"

namespace longspan {
namespace {

using nlohmann::ordered_json;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

MeanScore MeanOf(const NeedleReport& report, std::string label, auto&& belongs) {
  MeanScore mean;
  mean.label = std::move(label);
  double sum = 0;
  for (const v1::NeedleCell& cell : report.cells) {
    if (!cell.error().empty() || !belongs(cell)) continue;
    sum += cell.score();
    ++mean.n;
  }
  mean.mean = mean.n > 0 ? sum / mean.n : kNaN;
  mean.interval = Wilson(sum, mean.n);
  return mean;
}

std::string DepthLabel(float depth) { return absl::StrFormat("%g%%", std::round(depth * 10) / 10); }

std::string MeansText(const char* title, const std::vector<MeanScore>& means) {
  std::string out = absl::StrCat(title, "\n");
  for (const MeanScore& m : means) {
    if (m.n == 0) {
      absl::StrAppendFormat(&out, "  %7s  no cells\n", m.label);
    } else {
      absl::StrAppendFormat(&out, "  %7s  %.3f  [%.3f, %.3f]  n=%d\n", m.label, m.mean,
                            m.interval.low, m.interval.high, m.n);
    }
  }
  return out;
}

// One line, short enough for a terminal, without control characters.
std::string Shown(const std::string& text) {
  std::string out;
  for (const char c : text) out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  constexpr size_t kMost = 60;
  if (out.size() <= kMost) return out;
  size_t end = kMost;
  while (end > 0 && (static_cast<unsigned char>(out[end]) & 0xc0) == 0x80)
    --end;  // whole characters
  return out.substr(0, end) + "…";
}

ordered_json NumberOrNull(double value) {
  return std::isnan(value) ? ordered_json(nullptr) : ordered_json(value);
}

ordered_json Json(const std::vector<MeanScore>& means) {
  ordered_json list = ordered_json::array();
  for (const MeanScore& m : means) {
    list.push_back({{"label", m.label},
                    {"mean", NumberOrNull(m.mean)},
                    {"low", m.interval.low},
                    {"high", m.interval.high},
                    {"cells", m.n}});
  }
  return list;
}

std::string Table(const std::string& head, const std::string& rows) {
  return absl::StrCat("<table><thead><tr>", head, "</tr></thead><tbody>\n", rows,
                      "</tbody></table>\n");
}

std::string MeansHtml(const std::vector<MeanScore>& means) {
  std::string rows;
  for (const MeanScore& m : means) {
    absl::StrAppendFormat(&rows,
                          "<tr><td>%s</td><td>%s</td><td>%.3f to %.3f</td><td>%d</td></tr>\n",
                          EscapeXml(m.label), m.n > 0 ? absl::StrFormat("%.3f", m.mean) : "-",
                          m.interval.low, m.interval.high, m.n);
  }
  return Table("<th></th><th>mean</th><th>95 % interval</th><th>cells</th>", rows);
}

std::string WorstHtml(const std::vector<const v1::NeedleCell*>& worst) {
  std::string rows;
  for (const v1::NeedleCell* cell : worst) {
    absl::StrAppendFormat(
        &rows, "<tr><td>%s</td><td>%s</td><td>%d</td><td>%.2f</td><td>%s</td><td>%s</td></tr>\n",
        LengthLabel(cell->context_length()), DepthLabel(cell->depth_percent()), cell->trial(),
        cell->score(), EscapeXml(cell->expected()),
        EscapeXml(cell->error().empty() ? cell->answer() : cell->error()));
  }
  if (rows.empty()) return "<p>None: every cell was answered in full.</p>\n";
  return Table(
      "<th>length</th><th>depth</th><th>trial</th><th>score</th><th>expected</th>"
      "<th>answer</th>",
      rows);
}

absl::Status WriteFile(const std::filesystem::path& path, const std::string& text) {
  // Written aside and renamed, so that an interrupted run never leaves half a file.
  const std::string aside = path.string() + ".new";
  std::ofstream out(aside, std::ios::binary | std::ios::trunc);
  out << text;
  out.close();
  std::error_code error;
  if (out) std::filesystem::rename(aside, path, error);
  if (!out || error) {
    return absl::UnavailableError(absl::StrCat("cannot write ", path.string()));
  }
  return absl::OkStatus();
}

// What of a request decides its cells' results.
v1::RunNeedleRequest Settings(v1::RunNeedleRequest request) {
  request.clear_skip_cells();
  request.clear_detach();
  request.clear_concurrency();
  request.clear_priority();
  request.clear_run_id();
  request.clear_record_attention_spans();
  return request;
}

absl::Status CheckSame(const std::string& folder, const v1::RunNeedleRequest& there,
                       const v1::RunNeedleRequest& asked) {
  google::protobuf::util::MessageDifferencer differencer;
  std::string difference;
  differencer.ReportDifferencesToString(&difference);
  if (differencer.Compare(Settings(there), Settings(asked))) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat(folder, " holds a run with other settings (there -> asked): ",
                   difference.substr(0, difference.find('\n')), "; choose another --out"));
}

}  // namespace

Interval Wilson(double successes, int n) {
  if (n <= 0) return {};
  constexpr double kZ = 1.959963984540054;  // the normal's 97.5 % point
  const double p = successes / n, z2 = kZ * kZ / n;
  const double centre = (p + z2 / 2) / (1 + z2);
  const double half = kZ / (1 + z2) * std::sqrt(p * (1 - p) / n + z2 / (4 * n));
  return {std::max(0.0, centre - half), std::min(1.0, centre + half)};
}

std::string LengthLabel(uint32_t tokens) {
  return tokens > 0 && tokens % 1024 == 0 ? absl::StrCat(tokens / 1024, "k") : absl::StrCat(tokens);
}

const char* KindLabel(v1::LayerKind kind) {
  switch (kind) {
    case v1::LAYER_KIND_FULL:
      return "full";
    case v1::LAYER_KIND_SLIDING:
      return "sliding";
    case v1::LAYER_KIND_LINEAR:
      return "linear";
    case v1::LAYER_KIND_CHUNKED:
      return "chunked";
    default:
      return "?";
  }
}

MeanScore Overall(const NeedleReport& report) {
  return MeanOf(report, "all", [](const v1::NeedleCell&) { return true; });
}

std::vector<MeanScore> ByLength(const NeedleReport& report) {
  std::vector<MeanScore> means;
  for (int i = 0; i < report.request.context_lengths_size(); ++i) {
    means.push_back(
        MeanOf(report, LengthLabel(report.request.context_lengths(i)),
               [&](const v1::NeedleCell& c) { return static_cast<int>(c.length_index()) == i; }));
  }
  return means;
}

std::vector<MeanScore> ByDepth(const NeedleReport& report) {
  std::vector<MeanScore> means;
  for (int i = 0; i < report.request.depth_percents_size(); ++i) {
    means.push_back(
        MeanOf(report, DepthLabel(report.request.depth_percents(i)),
               [&](const v1::NeedleCell& c) { return static_cast<int>(c.depth_index()) == i; }));
  }
  return means;
}

bool OutOfReach(const v1::NeedleCell& cell, int window) {
  return int64_t{cell.prompt_tokens()} - int64_t{cell.needle_token_end()} >= 2 * int64_t{window};
}

std::vector<HeadMass> HeadsByMass(const NeedleReport& report) {
  std::map<std::pair<uint32_t, uint32_t>, HeadMass> sums;
  int cells = 0;
  for (const v1::NeedleCell& cell : report.cells) {
    if (cell.layers().empty() || !OutOfReach(cell, report.window)) continue;
    ++cells;
    for (const v1::LayerNeedleMass& layer : cell.layers()) {
      for (int h = 0; h < layer.head_mass_size(); ++h) {
        HeadMass& sum = sums[{layer.layer(), h}];
        sum.layer = layer.layer();
        sum.head = h;
        sum.kind = layer.kind();
        sum.mass += layer.head_mass(h);
      }
    }
  }
  std::vector<HeadMass> heads;
  for (auto& [where, head] : sums) {
    head.mass /= cells;
    heads.push_back(head);
  }
  std::stable_sort(heads.begin(), heads.end(),
                   [](const HeadMass& a, const HeadMass& b) { return a.mass > b.mass; });
  return heads;
}

std::vector<const v1::NeedleCell*> WorstCells(const NeedleReport& report) {
  std::vector<const v1::NeedleCell*> worst;
  for (const v1::NeedleCell& cell : report.cells) {
    if (!cell.error().empty() || cell.score() < 1) worst.push_back(&cell);
  }
  std::stable_sort(worst.begin(), worst.end(), [](const auto* a, const auto* b) {
    return (a->error().empty() ? a->score() : -1) < (b->error().empty() ? b->score() : -1);
  });
  return worst;
}

HeatMap ScoreMap(const NeedleReport& report) {
  HeatMap map;
  map.title = absl::StrCat(report.model, ": needle found, by depth and context length");
  map.row_title = "depth";
  map.column_title = "context length (tokens)";
  for (const float depth : report.request.depth_percents()) map.rows.push_back(DepthLabel(depth));
  for (const uint32_t length : report.request.context_lengths()) {
    map.columns.push_back(LengthLabel(length));
  }
  std::vector<double> sums(map.rows.size() * map.columns.size());
  std::vector<int> counts(sums.size());
  for (const v1::NeedleCell& cell : report.cells) {
    if (!cell.error().empty()) continue;
    const size_t i = cell.depth_index() * map.columns.size() + cell.length_index();
    sums[i] += cell.score();
    ++counts[i];
  }
  for (size_t i = 0; i < sums.size(); ++i) {
    map.values.push_back(counts[i] > 0 ? sums[i] / counts[i] : kNaN);
  }
  return map;
}

HeatMap HeadMap(const NeedleReport& report) {
  HeatMap map;
  map.title = "attention mass on the needle, by layer and head";
  map.row_title = "layer";
  map.column_title = "query head";
  std::map<uint32_t, const char*> layers;
  uint32_t heads = 0;
  const std::vector<HeadMass> masses = HeadsByMass(report);
  for (const HeadMass& m : masses) {
    layers[m.layer] = KindLabel(m.kind);
    heads = std::max(heads, m.head + 1);
  }
  std::map<uint32_t, size_t> row_of;
  for (const auto& [layer, kind] : layers) {
    row_of[layer] = map.rows.size();
    map.rows.push_back(absl::StrCat(layer, " ", kind));
  }
  for (uint32_t h = 0; h < heads; ++h) map.columns.push_back(absl::StrCat(h));
  map.values.assign(map.rows.size() * map.columns.size(), kNaN);
  for (const HeadMass& m : masses) map.values[row_of[m.layer] * heads + m.head] = m.mass;
  return map;
}

std::string ReportText(const NeedleReport& report, int worst) {
  const MeanScore all = Overall(report);
  std::string out =
      absl::StrFormat("mean score %.3f  95%% interval [%.3f, %.3f]  %d cells in %.1f s%s\n\n",
                      all.mean, all.interval.low, all.interval.high, all.n, report.seconds,
                      report.complete ? "" : "  (incomplete)");
  absl::StrAppend(&out, MeansText("by context length", ByLength(report)), "\n",
                  MeansText("by depth", ByDepth(report)));
  const auto bad = WorstCells(report);
  if (bad.empty()) {
    out += "\nevery cell was answered in full\n";
  } else {
    absl::StrAppendFormat(&out, "\nworst cells (%d of %d below 1)\n", bad.size(),
                          report.cells.size());
  }
  for (size_t i = 0; i < bad.size() && static_cast<int>(i) < worst; ++i) {
    const v1::NeedleCell& cell = *bad[i];
    absl::StrAppendFormat(&out, "  %6s at %-5s trial %d: score %.2f, expected %s, %s '%s'\n",
                          LengthLabel(cell.context_length()), DepthLabel(cell.depth_percent()),
                          cell.trial(), cell.score(), cell.expected(),
                          cell.error().empty() ? "answered" : "error",
                          Shown(cell.error().empty() ? cell.answer() : cell.error()));
  }
  const std::vector<HeadMass> heads = HeadsByMass(report);
  if (heads.empty()) return out;
  absl::StrAppendFormat(&out,
                        "\nretrieval heads (mean attention above %g on needles more than %d tokens "
                        "back)\n",
                        kRetrievalMass, 2 * report.window);
  for (const HeadMass& head : heads) {
    if (head.mass <= kRetrievalMass) break;
    absl::StrAppendFormat(&out, "  layer %-2d %-7s  head %-2d  %.3f\n", head.layer,
                          KindLabel(head.kind), head.head, head.mass);
  }
  std::map<v1::LayerKind, double> rest;  // heads come by mass: the first of a kind is its largest
  for (const HeadMass& head : heads) {
    if (head.mass <= kRetrievalMass) rest.emplace(head.kind, head.mass);
  }
  for (const auto& [kind, mass] : rest) {
    absl::StrAppendFormat(&out, "  largest of the other %s heads: %.3f\n", KindLabel(kind), mass);
  }
  return out;
}

std::string SummaryJson(const NeedleReport& report) {
  const MeanScore all = Overall(report);
  ordered_json heads = ordered_json::array();
  for (const HeadMass& head : HeadsByMass(report)) {
    if (head.mass <= kRetrievalMass) break;
    heads.push_back({{"layer", head.layer},
                     {"kind", KindLabel(head.kind)},
                     {"head", head.head},
                     {"mean_needle_mass", head.mass}});
  }
  int failed = 0;
  for (const v1::NeedleCell& cell : report.cells) failed += !cell.error().empty();
  const ordered_json summary = {
      {"run_id", report.run_id},
      {"model", report.model},
      {"server_version", report.version},
      {"complete", report.complete},
      {"seconds", report.seconds},
      {"cells", report.cells.size()},
      {"failed_cells", failed},
      {"mean_score", NumberOrNull(all.mean)},
      {"interval", {all.interval.low, all.interval.high}},
      {"by_length", Json(ByLength(report))},
      {"by_depth", Json(ByDepth(report))},
      {"retrieval_heads", heads},
      {"request", ordered_json::parse(cli::ToJson(report.request, false), nullptr, false)},
  };
  // Text that is not UTF-8 cannot come from protobuf strings; replace rather than throw all the
  // same.
  return summary.dump(2, ' ', false, ordered_json::error_handler_t::replace);
}

std::string ReportHtml(const NeedleReport& report) {
  const MeanScore all = Overall(report);
  std::string out = absl::StrCat(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"/><title>Needle run ",
      EscapeXml(report.run_id),
      "</title>\n<style>body{font:15px sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
      "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid "
      "#ccc;text-align:left}svg{max-width:100%;height:auto}</style></head><body>\n<h1>Needle run ",
      EscapeXml(report.run_id), "</h1>\n");
  absl::StrAppendFormat(&out,
                        "<p>Model %s, server %s, seed %d. Mean score <b>%s</b> (95 %% interval "
                        "%.3f to %.3f, %d cells "
                        "in %.1f s%s).</p>\n",
                        EscapeXml(report.model), EscapeXml(report.version), report.request.seed(),
                        all.n > 0 ? absl::StrFormat("%.3f", all.mean) : "-", all.interval.low,
                        all.interval.high, all.n, report.seconds,
                        report.complete ? "" : ", incomplete");
  absl::StrAppend(&out, DrawSvg(ScoreMap(report)), "<h2>By context length</h2>\n",
                  MeansHtml(ByLength(report)), "<h2>By depth</h2>\n", MeansHtml(ByDepth(report)),
                  "<h2>Worst cells</h2>\n", WorstHtml(WorstCells(report)));
  if (const HeatMap heads = HeadMap(report); !heads.rows.empty()) {
    absl::StrAppend(&out, "<h2>Where the heads look</h2>\n", DrawSvg(heads));
  }
  // "<" inside JSON strings would end the element; its escape is the same string.
  absl::StrAppend(&out, "<script type=\"application/json\" id=\"summary\">",
                  absl::StrReplaceAll(SummaryJson(report),
                                      {{"<", "\\u003c"}, {">", "\\u003e"}, {"&", "\\u0026"}}),
                  "</script>\n</body></html>\n");
  return out;
}

absl::Status WriteReport(const std::string& folder, const NeedleReport& report) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    return absl::UnavailableError(absl::StrCat("cannot make ", folder, ": ", error.message()));
  }
  std::string lines;
  for (const v1::NeedleCell& cell : report.cells) {
    absl::StrAppend(&lines, cli::ToJson(cell, false), "\n");
  }
  const std::filesystem::path path(folder);
  for (const auto& [name, text] : std::vector<std::pair<std::string, std::string>>{
           {"results.jsonl", lines},
           {"summary.json", SummaryJson(report) + "\n"},
           {"heatmap.svg", DrawSvg(ScoreMap(report))},
           {"report.html", ReportHtml(report)}}) {
    if (absl::Status s = WriteFile(path / name, text); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status AppendCell(const std::string& folder, const v1::NeedleCell& cell) {
  std::ofstream out(std::filesystem::path(folder) / "results.jsonl",
                    std::ios::binary | std::ios::app);
  out << cli::ToJson(cell, false) << "\n" << std::flush;
  if (out) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot write to ", folder, "/results.jsonl"));
}

absl::StatusOr<NeedleReport> LoadReport(const std::string& folder,
                                        const v1::RunNeedleRequest& request) {
  NeedleReport report;
  report.request = request;
  const std::filesystem::path path(folder);
  std::ifstream summary_file(path / "summary.json", std::ios::binary);
  if (!summary_file) return report;
  const auto summary = nlohmann::json::parse(summary_file, nullptr, false);
  v1::RunNeedleRequest there;
  if (!summary.is_object() || !summary.contains("request") ||
      !google::protobuf::util::JsonStringToMessage(summary["request"].dump(), &there).ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat(folder, "/summary.json is not a needle run's; choose another --out"));
  }
  if (absl::Status s = CheckSame(folder, there, request); !s.ok()) return s;
  if (summary.contains("seconds") && summary["seconds"].is_number()) {
    report.seconds = summary["seconds"].get<double>();
  }
  std::map<std::tuple<uint32_t, uint32_t, uint32_t>, v1::NeedleCell> cells;
  std::ifstream lines(path / "results.jsonl", std::ios::binary);
  for (std::string line; std::getline(lines, line);) {
    v1::NeedleCell cell;
    if (!google::protobuf::util::JsonStringToMessage(line, &cell).ok()) continue;
    const bool inside = static_cast<int>(cell.length_index()) < request.context_lengths_size() &&
                        static_cast<int>(cell.depth_index()) < request.depth_percents_size() &&
                        cell.trial() < request.trials();
    if (inside && cell.error().empty()) {
      cells[{cell.trial(), cell.length_index(), cell.depth_index()}] = std::move(cell);
    }
  }
  for (auto& [key, cell] : cells) report.cells.push_back(std::move(cell));
  return report;
}

}  // namespace longspan
