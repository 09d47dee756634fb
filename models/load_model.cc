#include <filesystem>
#include <future>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/family.h"
#include "models/model.h"
#include "models/random_checkpoint.h"

namespace longspan {
namespace {

absl::Status CheckRuns(const std::string& path, const OpTable& ops) {
  const absl::StatusOr<ModelSpec> spec = ReadSpecAt(path);
  if (!spec.ok()) return spec.status();
  const std::vector<std::string> missing = MissingFor(*spec, ops);
  if (missing.empty()) return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(
      path, ": ", spec->family, " needs what is missing: ", absl::StrJoin(missing, ", ")));
}

// Knows no text: ids outside its vocabulary of one have none.
absl::StatusOr<std::unique_ptr<Tokenizer>> TokenizerOfNoText() {
  return Tokenizer::FromGguf({{"tokenizer.ggml.model", std::string("llama")},
                              {"tokenizer.ggml.tokens", std::vector<std::string>{"<unk>"}},
                              {"tokenizer.ggml.token_type", std::vector<int64_t>{2}},
                              {"tokenizer.ggml.scores", std::vector<double>{0}},
                              {"tokenizer.ggml.unknown_token_id", uint64_t{0}}});
}

}  // namespace

absl::StatusOr<LoadedModel> LoadModel(const std::string& path, Backend& backend,
                                      const ModelOptions& options) {
  LoadedModel loaded;
  // A directory's description before its weights: those of a family that cannot run may be of types
  // that cannot be read either, and the missing features say more. A GGUF file describes itself.
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    if (absl::Status runs = CheckRuns(path, backend.ops()); !runs.ok()) return runs;
  }
  auto checkpoint = Checkpoint::Open(path);
  if (!checkpoint.ok()) return checkpoint.status();
  loaded.checkpoint = *std::move(checkpoint);

  // One thread's work of strings while the backend's pack the weights. It is this thread's: glibc
  // gives another one memory by the page, a system call for each, of which a large vocabulary takes
  // thousands.
  auto packing = std::async(std::launch::async, [&loaded, &backend, &options] {
    return Model::Load(loaded.checkpoint, backend, options);
  });
  auto tokenizer = Tokenizer::Create(*loaded.checkpoint);
  auto model = packing.get();
  if (!tokenizer.ok()) return tokenizer.status();
  if (!model.ok()) return model.status();
  loaded.tokenizer = *std::move(tokenizer);
  loaded.model = *std::move(model);

  const ModelSpec& spec = loaded.model->spec();
  if (loaded.tokenizer->vocab_size() > spec.vocab) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": the tokenizer has ",
                                                   loaded.tokenizer->vocab_size(),
                                                   " tokens, the embedding table ", spec.vocab));
  }
  loaded.chat_template = ChatTemplate::For(spec, *loaded.tokenizer);
  return loaded;
}

absl::StatusOr<LoadedModel> LoadRandomModel(const std::string& config, DType matrices,
                                            Backend& backend, const ModelOptions& options) {
  if (absl::Status runs = CheckRuns(config, backend.ops()); !runs.ok()) return runs;
  LoadedModel loaded;
  const View any = View::Matrix(nullptr, matrices, 1, Info(matrices).block_elements);
  auto checkpoint = MakeRandomCheckpoint(
      config, {.matrices = matrices, .overlapping = backend.WeightBytes(any) > 0});
  if (!checkpoint.ok()) return checkpoint.status();
  loaded.checkpoint = *std::move(checkpoint);
  auto tokenizer = TokenizerOfNoText();
  if (!tokenizer.ok()) return tokenizer.status();
  loaded.tokenizer = *std::move(tokenizer);
  auto model = Model::Load(loaded.checkpoint, backend, options);
  if (!model.ok()) return model.status();
  loaded.model = *std::move(model);
  return loaded;
}

}  // namespace longspan
