// Requests as bytes off the wire, to the engine's requests: the first byte picks the message.
#include <cstdlib>
#include <memory>

#include "engine/validate.h"
#include "kernels/check.h"
#include "server/needle_request.h"
#include "server/request_conversion.h"
#include "tests/support/paths.h"

namespace longspan {
namespace {

struct World {
  std::unique_ptr<Tokenizer> tokenizer;
  ModelSpec spec;
  std::unique_ptr<ChatTemplate> chat_template;
  ConversionContext context;
  RequestLimits limits;

  World() {
    auto checkpoint = Checkpoint::Open(testing::SourcePath("models/default"));
    CHECK(checkpoint.ok()) << checkpoint.status().ToString();
    auto created = Tokenizer::Create(**checkpoint);
    CHECK(created.ok()) << created.status().ToString();
    tokenizer = *std::move(created);
    spec.vocab = tokenizer->vocab_size();
    chat_template = ChatTemplate::For(spec, *tokenizer);
    limits.vocab = spec.vocab;
    limits.max_context = 1000;
    context.tokenizer = tokenizer.get();
    context.chat_template = chat_template.get();
    context.spec = &spec;
    context.max_context = limits.max_context;
    context.model_names = {"default"};
    context.max_prompt_bytes = 4096;
  }
};

// What conversion lets through is whole: the engine's own check takes it or names a field.
void Check(const World& world, const absl::StatusOr<Request>& request) {
  if (!request.ok()) {
    if (request.status().message().empty()) std::abort();
    return;
  }
  for (int32_t token : request->prompt) {
    if (token < 0 || token >= world.spec.vocab) std::abort();
  }
  const absl::Status valid = Validate(*request, world.limits);
  if (!valid.ok() && !absl::IsInvalidArgument(valid)) std::abort();
}

}  // namespace
}  // namespace longspan

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace longspan;
  static const World* const world = new World;
  if (size == 0) return 0;
  const int bytes = static_cast<int>(size - 1);
  switch (data[0]) {
    case 'p': {
      v1::CompleteRequest message;
      if (message.ParseFromArray(data + 1, bytes))
        Check(*world, ToRequest(message, world->context));
      break;
    }
    case 'c': {
      v1::ChatRequest message;
      if (message.ParseFromArray(data + 1, bytes))
        Check(*world, ToRequest(message, world->context));
      break;
    }
    case 'n': {
      v1::RunNeedleRequest message;
      if (!message.ParseFromArray(data + 1, bytes)) break;
      const auto whole = CompleteNeedleRequest(message, world->context);
      if (whole.ok()) CellsOf(*whole);
      break;
    }
    default:
      break;
  }
  return 0;
}
