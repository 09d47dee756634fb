#include "server/prompt_worker.h"

#include <utility>

namespace longspan {

PromptWorker::PromptWorker() : thread_([this] { Loop(); }) {}

PromptWorker::~PromptWorker() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
}

void PromptWorker::Run(size_t bytes, std::function<void()> job) {
  if (bytes <= kLongBytes) return job();
  absl::MutexLock lock(&mu_);
  jobs_.push_back(std::move(job));
}

void PromptWorker::Loop() {
  while (true) {
    std::function<void()> job;
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &PromptWorker::HasWork));
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
  }
}

}  // namespace longspan
