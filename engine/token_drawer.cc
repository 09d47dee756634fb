#include "engine/token_drawer.h"

#include "kernels/check.h"

namespace longspan {
namespace {

constexpr size_t kMaxDraws = 256;  // of one run

}  // namespace

TokenDrawer::TokenDrawer(Backend& backend, size_t max_edits)
    : backend_(backend), max_edits_(max_edits) {
  if (backend.host_memory()) return;
  draws_ = backend.Allocate(kMaxDraws * sizeof(Draw));
  edits_ = backend.Allocate(max_edits_ * sizeof(LogitEdit));
  tokens_ = backend.Allocate(kMaxDraws * sizeof(int32_t));
}

const std::vector<int32_t>& TokenDrawer::Tokens(const View& logits, const DrawList& list) {
  drawn_.resize(list.draws.size());
  for (size_t begin = 0; begin < list.draws.size();) {
    const int32_t first_edit = list.draws[begin].edit_begin;
    size_t end = begin + 1;
    while (end < list.draws.size() && end - begin < kMaxDraws &&
           list.draws[end].edit_end - first_edit <= static_cast<int64_t>(max_edits_)) {
      ++end;
    }
    Run(logits, list, begin, end, drawn_.data() + begin);
    begin = end;
  }
  return drawn_;
}

void TokenDrawer::Run(const View& logits, const DrawList& list, size_t begin, size_t end,
                      int32_t* tokens) {
  const auto count = static_cast<int64_t>(end - begin);
  const int32_t first_edit = list.draws[begin].edit_begin;
  const size_t edits = list.draws[end - 1].edit_end - first_edit;
  CHECK_LE(edits, max_edits_);
  staged_.assign(list.draws.begin() + begin, list.draws.begin() + end);
  for (Draw& draw : staged_) {
    draw.edit_begin -= first_edit;
    draw.edit_end -= first_edit;
  }
  SampleArgs args = {.logits = logits,
                     .draws = staged_.data(),
                     .edits = list.edits.data() + first_edit,
                     .tokens = View::Vector(tokens, DType::kI32, count)};
  if (backend_.host_memory()) return backend_.Run(backend_.ops().Sample, args);
  backend_.CopyIn(draws_.data(), args.draws, count * sizeof(Draw));
  backend_.CopyIn(edits_.data(), args.edits, edits * sizeof(LogitEdit));
  args.draws = reinterpret_cast<const Draw*>(draws_.data());
  args.edits = reinterpret_cast<const LogitEdit*>(edits_.data());
  args.tokens = View::Vector(tokens_.data(), DType::kI32, count);
  backend_.Run(backend_.ops().Sample, args);
  backend_.CopyOut(tokens, tokens_.data(), count * sizeof(int32_t));
}

}  // namespace longspan
