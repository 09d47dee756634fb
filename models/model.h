#pragma once
// A model: its spec and canonical weights on one backend. Forward is const and keeps no per-request
// state, but uses the model's one activation workspace: one thread at a time (the engine's).
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "models/chat_template.h"
#include "models/checkpoint.h"
#include "models/spec.h"
#include "models/step.h"
#include "models/tokenizer.h"

namespace longspan {

struct ModelOptions {
  int max_rows = 2048;  // of one step; sizes the workspace
  int max_logit_rows =
      256;  // rows beyond this are computed in further passes of the output product
  DType cache_dtype = DType::kBF16;  // BF16, F32 or, on a CPU, Q8_0
};

class Model {
 public:
  // Binds the checkpoint's tensors to slots, checking every shape against the spec, folds norms,
  // and allocates the workspace. Weights of a host-memory backend stay mapped; the checkpoint is
  // kept alive.
  static absl::StatusOr<std::unique_ptr<Model>> Load(std::shared_ptr<const Checkpoint> checkpoint,
                                                     Backend& backend, const ModelOptions& options);
  ~Model();

  const ModelSpec& spec() const { return spec_; }
  DType cache_dtype() const { return options_.cache_dtype; }
  int max_rows() const { return options_.max_rows; }
  int64_t weight_bytes() const { return weight_bytes_; }
  int max_heads() const { return max_heads_; }

  // Runs the step: reads and extends the caches, returns logits [logit_rows, vocab] F32 in the
  // backend's memory, valid until the next Forward.
  View Forward(const Step& step);
  // Logits of more rows of the last step: `rows` [n] I32 in the backend's memory, n <=
  // max_logit_rows. Overwrites what Forward returned.
  View Logits(const View& rows);
  int max_logit_rows() const { return options_.max_logit_rows; }

 private:
  struct Layer;
  struct Workspace;
  Model(ModelSpec spec, ModelOptions options, Backend& backend);
  View Issue(const Step& step);
  absl::Status BindWeights();
  void AllocateWorkspace();
  // A product of packed x, which takes the type that the backend multiplies: its memory is yet to
  // be written.
  MatMulArgs Product(const View& x, std::initializer_list<View> parts, const View& out) const;
  // A layer's products of the normed residual.
  MatMulArgs Qkv(int64_t rows, int index) const;
  MatMulArgs GateUp(int64_t rows, int index) const;
  void RunMixer(const Step& step, int index);
  void RunMlp(int64_t rows, int index);
  // Adds the block's branch to the residual and norms that for the next block (empty: none) into
  // `normed`.
  void AddBranch(int64_t rows, const View& post_norm, const View& next_norm, const View& normed);

  ModelSpec spec_;
  ModelOptions options_;
  Backend& backend_;
  std::shared_ptr<const Checkpoint> checkpoint_;
  std::vector<Layer> layers_;
  View embedding_, final_norm_, output_;
  std::vector<Buffer> owned_;
  std::unique_ptr<Workspace> work_;
  int64_t weight_bytes_ = 0;
  int max_heads_ = 0;
};

// Everything that serving one model needs; what `serve` and the tests load.
struct LoadedModel {
  std::shared_ptr<const Checkpoint> checkpoint;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<ChatTemplate> chat_template;  // may be nullptr
  std::unique_ptr<Model> model;
};
absl::StatusOr<LoadedModel> LoadModel(const std::string& path, Backend& backend,
                                      const ModelOptions& options);

// The model that a config.json describes, with random weights (models/random_checkpoint.h) and a
// tokenizer that knows no text: ids go in and come out. To measure a shape without its weights.
absl::StatusOr<LoadedModel> LoadRandomModel(const std::string& config, DType matrices,
                                            Backend& backend, const ModelOptions& options);

}  // namespace longspan
