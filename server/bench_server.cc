// How fast a live server answers under load.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "longspan/v1/admin.grpc.pb.h"
#include "longspan/v1/inference.grpc.pb.h"
#include "server/bench.h"

namespace longspan {
namespace {

using nlohmann::ordered_json;

struct Load {
  absl::Mutex mu;
  int next ABSL_GUARDED_BY(mu) = 0;
  std::vector<double> first ABSL_GUARDED_BY(mu), between ABSL_GUARDED_BY(mu);
  int64_t tokens ABSL_GUARDED_BY(mu) = 0;
  grpc::Status failed ABSL_GUARDED_BY(mu);
};

void OneRequest(v1::InferenceService::Stub& stub, const BenchOptions& options, uint32_t vocab,
                int number, Load& load) {
  v1::StreamCompleteRequest request;
  auto* ids = request.mutable_request()->mutable_token_ids();
  for (int64_t i = 0; i < options.prompts[0].tokens; ++i) {
    ids->add_ids(static_cast<uint32_t>((i * 7919 + number * 104729LL) % vocab));
  }
  request.mutable_request()->mutable_sampling()->set_temperature(0);
  request.mutable_request()->mutable_stopping()->set_max_tokens(options.tokens);
  request.mutable_request()->mutable_stopping()->set_ignore_eos(true);
  request.mutable_request()->mutable_output()->set_return_token_ids(true);
  grpc::ClientContext context;
  absl::Time last = absl::Now();
  auto reader = stub.StreamComplete(&context, request);
  v1::StreamCompleteResponse message;
  bool first = true;
  while (reader->Read(&message)) {
    const int tokens = message.delta().token_ids_size();
    if (tokens == 0) continue;
    const absl::Time now = absl::Now();
    absl::MutexLock lock(&load.mu);
    if (first) {
      load.first.push_back(absl::ToDoubleSeconds(now - last));
    } else {
      // Tokens that came together share the time since the last message.
      load.between.insert(load.between.end(), tokens, absl::ToDoubleSeconds(now - last) / tokens);
    }
    load.tokens += tokens;
    first = false;
    last = now;
  }
  const grpc::Status status = reader->Finish();
  absl::MutexLock lock(&load.mu);
  if (!status.ok()) load.failed = status;
}

double PercentileOf(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1,
                         static_cast<size_t>(share * static_cast<double>(values.size())))];
}

}  // namespace

int BenchServer(const BenchOptions& options) {
  const auto channel = cli::Connect(options.target);
  v1::GetModelResponse model;
  grpc::ClientContext context;
  if (const auto status = v1::ModelService::NewStub(channel)->GetModel(&context, {}, &model);
      !status.ok()) {
    return cli::Fail("bench", status);
  }
  const auto stub = v1::InferenceService::NewStub(channel);
  Load load;
  const absl::Time begin = absl::Now();
  std::vector<std::thread> workers;
  for (int w = 0; w < options.concurrency; ++w) {
    workers.emplace_back([&] {
      while (true) {
        int number = 0;
        {
          absl::MutexLock lock(&load.mu);
          if (load.next >= options.requests || !load.failed.ok()) return;
          number = load.next++;
        }
        OneRequest(*stub, options, model.model().vocab_size(), number, load);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  absl::MutexLock lock(&load.mu);
  if (!load.failed.ok()) return cli::Fail("bench", load.failed);
  ordered_json result = {
      {"model", model.model().id()},
      {"requests", options.requests},
      {"concurrency", options.concurrency},
      {"prompt_tokens", options.prompts[0].tokens},
      {"seconds", seconds},
      {"requests_per_second", options.requests / seconds},
      {"generated_tokens_per_second", static_cast<double>(load.tokens) / seconds}};
  for (const double p : {0.5, 0.9, 0.99}) {
    const int percent = static_cast<int>(std::lround(p * 100));
    result[absl::StrCat("ttft_ms_p", percent)] = PercentileOf(load.first, p) * 1e3;
    result[absl::StrCat("itl_ms_p", percent)] = PercentileOf(load.between, p) * 1e3;
  }
  if (options.json) {
    std::cout << result.dump(2) << "\n";
  } else {
    for (const auto& [name, value] : result.items()) {
      std::cout << absl::StreamFormat("%-28s ", name)
                << (value.is_number_float() ? absl::StrFormat("%.2f", value.get<double>())
                    : value.is_string()     ? value.get<std::string>()
                                            : value.dump())
                << "\n";
    }
  }
  return 0;
}

}  // namespace longspan
