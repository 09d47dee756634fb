#include "absl/strings/str_cat.h"
#include "models/model.h"

namespace longspan {

absl::StatusOr<LoadedModel> LoadModel(const std::string& path, Backend& backend,
                                      const ModelOptions& options) {
  LoadedModel loaded;
  auto checkpoint = Checkpoint::Open(path);
  if (!checkpoint.ok()) return checkpoint.status();
  loaded.checkpoint = *std::move(checkpoint);

  auto tokenizer = Tokenizer::Create(*loaded.checkpoint);
  if (!tokenizer.ok()) return tokenizer.status();
  loaded.tokenizer = *std::move(tokenizer);

  auto model = Model::Load(loaded.checkpoint, backend, options);
  if (!model.ok()) return model.status();
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

}  // namespace longspan
