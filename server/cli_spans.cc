// longspan spans: how far each head looks, layer by layer.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <iostream>

#include "absl/strings/str_format.h"
#include "longspan/v1/attention.grpc.pb.h"
#include "server/cli.h"
#include "server/cli_client.h"

namespace longspan {
namespace {

const char* KindOf(const v1::LayerSpans& layer) {
  return layer.kind() == v1::LAYER_KIND_FULL ? "full" : "sliding";
}

struct Column {
  const char* name;
  const char* what;
  const google::protobuf::RepeatedField<float>& (v1::LayerSpans::*values)() const;
  bool tokens;  // in tokens, drawn on a logarithmic scale; else a share
};

const Column kColumns[] = {
    {"span", "mean attention distance in tokens, the first 4 tokens left out",
     &v1::LayerSpans::mean_tokens, true},
    {"far", "share of attention beyond the model's window", &v1::LayerSpans::far_mass_ratio, false},
    {"sink", "share of attention on the first 4 tokens", &v1::LayerSpans::sink_mass_ratio, false},
    {"entropy", "attention entropy, 1 is uniform", &v1::LayerSpans::entropy_ratio, false},
    {"top", "largest attention probability", &v1::LayerSpans::top_probability, false},
    {"copy", "tokens generated that equal the far token attended to most",
     &v1::LayerSpans::copy_hit_ratio, false},
};

void Print(const v1::SpanSnapshot& snapshot, const Column& column, bool colour) {
  float highest = 1;
  for (const auto& layer : snapshot.layers()) {
    for (float v : (layer.*column.values)()) highest = std::max(highest, v);
  }
  std::cout << column.what << "; " << snapshot.observed_tokens() << " observed tokens\n\n"
            << "layer  kind     window  ";
  for (uint32_t h = 0; h < snapshot.num_heads(); ++h)
    std::cout << absl::StreamFormat("  head%-2d ", h);
  std::cout << "\n";
  for (const auto& layer : snapshot.layers()) {
    std::cout << absl::StreamFormat(
        "%5d  %-7s  %6s  ", layer.layer(), KindOf(layer),
        layer.window_tokens() > 0 ? std::to_string(layer.window_tokens()) : "-");
    for (float v : (layer.*column.values)()) {
      const double shade = column.tokens ? std::log1p(v) / std::log1p(highest) : v;
      std::cout << (colour ? cli::HeatCell(shade, true) : "")
                << absl::StreamFormat("%7.*f ", column.tokens ? 1 : 3, v) << (colour ? "" : " ");
    }
    std::cout << "\n";
  }
}

// The heads where `by` is largest, with every column.
void PrintLargest(const v1::SpanSnapshot& snapshot, const Column& by, int count) {
  struct Head {
    const v1::LayerSpans* layer;
    int head;
    float value;
  };
  std::vector<Head> heads;
  for (const auto& layer : snapshot.layers()) {
    const auto& values = (layer.*by.values)();
    for (int h = 0; h < values.size(); ++h) heads.push_back({&layer, h, values[h]});
  }
  std::stable_sort(heads.begin(), heads.end(),
                   [](const Head& a, const Head& b) { return a.value > b.value; });
  if (heads.size() > static_cast<size_t>(count)) heads.resize(count);
  std::cout << "largest \"" << by.name << "\": " << by.what << "; " << snapshot.observed_tokens()
            << " observed tokens\n\nlayer  kind     head";
  for (const Column& column : kColumns) std::cout << absl::StreamFormat("  %8s", column.name);
  std::cout << "\n";
  for (const Head& head : heads) {
    std::cout << absl::StreamFormat("%5d  %-7s  %4d", head.layer->layer(), KindOf(*head.layer),
                                    head.head);
    for (const Column& column : kColumns) {
      std::cout << absl::StreamFormat("  %8.*f", column.tokens ? 1 : 3,
                                      (head.layer->*column.values)()[head.head]);
    }
    std::cout << "\n";
  }
}

}  // namespace

int RunSpans(int argc, char** argv) {
  cli::Target target;
  std::string show = "span", color = "auto";
  bool json = false, watch = false, reset = false;
  int heads = 0;
  absl::Duration interval = absl::Seconds(2);
  Flags flags("spans", "[flags]", "Shows how far each head of a live server looks.");
  cli::TargetFlags(flags, &target);
  std::vector<std::string> names;
  for (const Column& column : kColumns) names.push_back(column.name);
  flags.Choice("show", &show, names, "what to show");
  flags.Int("heads", &heads, "only so many heads, those where it is largest; 0 is all", 0);
  flags.Bool("watch", &watch, "go on, with what came since the last picture");
  flags.Duration("interval", &interval, "between two pictures of --watch");
  flags.Bool("json", &json, "everything, as JSON");
  flags.Bool("reset", &reset, "forget what was observed so far");
  cli::ColourFlag(flags, &color);
  if (auto exit = flags.Parse(argc, argv); exit.has_value()) return *exit;
  const Column& column = *std::find_if(std::begin(kColumns), std::end(kColumns),
                                       [&](auto& c) { return c.name == show; });
  const auto show_one = [&](const v1::SpanSnapshot& snapshot, bool colour) {
    if (heads > 0) {
      PrintLargest(snapshot, column, heads);
    } else {
      Print(snapshot, column, colour);
    }
  };
  const bool colour = cli::Colour(color, STDOUT_FILENO);
  auto stub = v1::AttentionService::NewStub(cli::Connect(target));
  grpc::ClientContext context;
  if (reset) {
    v1::ResetAttentionSpansResponse response;
    const auto status = stub->ResetAttentionSpans(&context, {}, &response);
    return status.ok() ? 0 : cli::Fail("spans", status);
  }
  if (!watch) {
    v1::GetAttentionSpansResponse response;
    const auto status = stub->GetAttentionSpans(&context, {}, &response);
    if (!status.ok()) return cli::Fail("spans", status);
    if (json) {
      std::cout << cli::ToJson(response, true) << "\n";
    } else {
      show_one(response.snapshot(), colour);
    }
    return 0;
  }
  v1::WatchAttentionSpansRequest request;
  request.mutable_interval()->set_seconds(absl::ToInt64Seconds(interval));
  request.mutable_interval()->set_nanos(
      static_cast<int>(absl::ToInt64Nanoseconds(interval % absl::Seconds(1))));
  auto reader = stub->WatchAttentionSpans(&context, request);
  v1::WatchAttentionSpansResponse message;
  while (reader->Read(&message)) {
    if (json) {
      std::cout << cli::ToJson(message, false) << std::endl;
    } else {
      if (colour) std::cout << "\033[H\033[2J";
      show_one(message.snapshot(), colour);
      std::cout << std::endl;
    }
  }
  const auto status = reader->Finish();
  return status.ok() ? 0 : cli::Fail("spans", status);
}

}  // namespace longspan
