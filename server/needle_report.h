#pragma once
// What a needle run tells: means with intervals, worst cells, retrieval heads; as text, JSON, SVG
// and one self-contained HTML page; and the folder that a run is kept in, so that it can be
// resumed.
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "longspan/v1/needle.pb.h"
#include "server/heatmap.h"

namespace longspan {

// The 95 % score interval of Wilson (1927) for `successes` of n; [0, 1] when n is 0. Successes may
// be fractional, since a cell's score is a share.
struct Interval {
  double low = 0, high = 1;
};
Interval Wilson(double successes, int n);

struct NeedleReport {
  v1::RunNeedleRequest request;        // the grid
  std::string run_id, model, version;  // of the server
  int window = 0;                      // of its sliding layers, in tokens
  double seconds = 0;
  bool complete = false;              // every cell is there
  std::vector<v1::NeedleCell> cells;  // one per (length, depth, trial) at most
};

struct MeanScore {
  std::string label;
  double mean = 0;  // NaN if n is 0
  int n = 0;
  Interval interval;
};
struct HeadMass {
  uint32_t layer = 0, head = 0;
  v1::LayerKind kind = v1::LAYER_KIND_UNSPECIFIED;
  double mass = 0;  // mean over cells
};
// A head counts as a retrieval head from this mean mass on the needle, over cells whose needle lies
// more than two windows before the answer: nearer ones are in reach of every head (the paper's
// threshold and rule).
inline constexpr double kRetrievalMass = 0.1;
bool OutOfReach(const v1::NeedleCell& cell, int window);

MeanScore Overall(const NeedleReport& report);
std::vector<MeanScore> ByLength(const NeedleReport& report);
std::vector<MeanScore> ByDepth(const NeedleReport& report);
std::vector<HeadMass> HeadsByMass(const NeedleReport& report);  // most first
// Cells with an error or a score below 1, worst first.
std::vector<const v1::NeedleCell*> WorstCells(const NeedleReport& report);
HeatMap ScoreMap(const NeedleReport& report);  // depth x length, means over trials
HeatMap HeadMap(const NeedleReport& report);   // layer x head; no rows without recorded masses

// "4k" for 4096, else the number.
std::string LengthLabel(uint32_t tokens);
const char* KindLabel(v1::LayerKind kind);

// Everything below the heat map: means, worst cells, heads.
std::string ReportText(const NeedleReport& report, int worst);
std::string SummaryJson(const NeedleReport& report);  // one object, pretty
std::string ReportHtml(const NeedleReport& report);

// `folder`/results.jsonl (one cell a line), summary.json, heatmap.svg, report.html; made if needed.
absl::Status WriteReport(const std::string& folder, const NeedleReport& report);
// Appends one cell to results.jsonl.
absl::Status AppendCell(const std::string& folder, const v1::NeedleCell& cell);
// What an earlier run left in `folder`: cells without errors, and its time; an empty report if the
// folder holds no run. FailedPrecondition if its grid or knobs are not those of `request`, naming
// the first field that differs. A torn last line is left out.
absl::StatusOr<NeedleReport> LoadReport(const std::string& folder,
                                        const v1::RunNeedleRequest& request);

}  // namespace longspan
