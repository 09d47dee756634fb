#include "models/model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <utility>

#include "absl/hash/hash.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/convert.h"
#include "models/family.h"

namespace longspan {
namespace {

// Radians per token of each rotated pair. Formula: Su et al., arXiv 2104.09864; linear scaling
// divides the position, hence every frequency, by `factor`.
std::vector<float> RopeFrequencies(const RopeSpec& rope) {
  std::vector<float> frequencies(rope.rotary_dim / 2);
  for (size_t i = 0; i < frequencies.size(); ++i) {
    const double exponent = 2.0 * static_cast<double>(i) / rope.rotary_dim;
    frequencies[i] = static_cast<float>(std::pow(rope.theta, -exponent) / rope.factor);
  }
  return frequencies;
}

}  // namespace

struct Model::Layer {
  View mixer_norm, q, k, v, q_norm, k_norm, o, mixer_post_norm;
  View mlp_norm, gate, up, down, mlp_post_norm, sinks;
  View frequencies;  // empty: no positions

  View* At(Slot::Id id) {
    switch (id) {
      case Slot::Id::kMixerNorm:
        return &mixer_norm;
      case Slot::Id::kQ:
        return &q;
      case Slot::Id::kK:
        return &k;
      case Slot::Id::kV:
        return &v;
      case Slot::Id::kQNorm:
        return &q_norm;
      case Slot::Id::kKNorm:
        return &k_norm;
      case Slot::Id::kO:
        return &o;
      case Slot::Id::kMixerPostNorm:
        return &mixer_post_norm;
      case Slot::Id::kMlpNorm:
        return &mlp_norm;
      case Slot::Id::kGate:
        return &gate;
      case Slot::Id::kUp:
        return &up;
      case Slot::Id::kDown:
        return &down;
      case Slot::Id::kMlpPostNorm:
        return &mlp_post_norm;
      case Slot::Id::kSinks:
        return &sinks;
      case Slot::Id::kEmbedding:
      case Slot::Id::kFinalNorm:
      case Slot::Id::kOutput:
        return nullptr;
    }
    return nullptr;
  }
};

// Activations of one step, each [max_rows, …]; a step uses the first rows. All F32, but what a
// product takes may be of another type in the same memory.
struct Model::Workspace {
  View residual;     // [rows, dim]
  View normed;       // [rows, dim]: the residual as the next block takes it
  View branch;       // [rows, dim]: what the mixer or the MLP adds
  View qkv;          // [rows, q + k + v columns of the widest layer]
  View key, value;   // [rows, kv columns] in the cache's dtype
  View attention;    // [rows, q columns]
  View gate_up;      // [rows, 2 * intermediate]
  View activated;    // [rows, intermediate]
  View last;         // [max_logit_rows, dim]
  View last_normed;  // [max_logit_rows, dim]
  View logits;       // [max_logit_rows, vocab]
};

namespace {

constexpr int64_t kMatrixAlignment = 256;

int64_t Aligned(int64_t bytes) {
  return (bytes + kMatrixAlignment - 1) / kMatrixAlignment * kMatrixAlignment;
}

View MatrixOf(const TensorInfo& tensor) {
  return View::Matrix(const_cast<std::byte*>(tensor.data.data()), tensor.dtype, tensor.shape[0],
                      tensor.shape[1]);
}

// Of all matrices that the backend keeps copies of, one after another. Their slots' order keeps
// those of one product (q, k and v; gate and up) side by side, where a device can take them for
// one.
int64_t MatrixBytes(const std::vector<Slot>& slots, const Checkpoint& checkpoint,
                    const Backend& backend) {
  int64_t bytes = 0;
  for (const Slot& slot : slots) {
    const TensorInfo* tensor = checkpoint.Find(slot.tensor);
    if (tensor == nullptr || tensor->shape != slot.shape || slot.shape.size() == 1) continue;
    bytes += Aligned(backend.WeightBytes(MatrixOf(*tensor)));
  }
  return bytes;
}

// A device with memory of its own must hold all weights; ResourceExhausted has both numbers.
absl::Status CheckMemory(const Checkpoint& checkpoint, const Backend& backend) {
  if (backend.host_memory()) return absl::OkStatus();
  int64_t needed = 0;
  for (const auto& [name, tensor] : checkpoint.tensors()) {
    needed += static_cast<int64_t>(tensor.data.size());
  }
  if (needed <= backend.FreeBytes()) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(checkpoint.path(), ": its weights are ", needed,
                                                   " bytes, ", backend.name(), " has ",
                                                   backend.FreeBytes(), " bytes free"));
}

}  // namespace

Model::Model(ModelSpec spec, ModelOptions options, Backend& backend)
    : spec_(std::move(spec)), options_(options), backend_(backend) {}
Model::~Model() = default;

absl::StatusOr<std::unique_ptr<Model>> Model::Load(std::shared_ptr<const Checkpoint> checkpoint,
                                                   Backend& backend, const ModelOptions& options) {
  auto spec = ReadSpec(*checkpoint);
  if (!spec.ok()) return spec.status();
  if (absl::Status valid = spec->Validate(); !valid.ok()) return valid;
  const std::vector<std::string> missing = MissingFor(*spec, backend.ops());
  if (!missing.empty()) {
    return absl::UnimplementedError(absl::StrCat(checkpoint->path(), ": ", spec->family, " needs ",
                                                 absl::StrJoin(missing, ", "), ", which ",
                                                 backend.name(), " does not have"));
  }
  if (absl::Status whole = spec->ValidateCache(options.cache_dtype); !whole.ok()) return whole;
  if (absl::Status fits = CheckMemory(*checkpoint, backend); !fits.ok()) return fits;
  std::unique_ptr<Model> model(new Model(*std::move(spec), options, backend));
  model->checkpoint_ = std::move(checkpoint);
  if (absl::Status bound = model->BindWeights(); !bound.ok()) return bound;
  model->AllocateWorkspace();
  for (const Buffer& buffer : model->owned_) {
    if (buffer.data() != nullptr) continue;
    return absl::ResourceExhaustedError(absl::StrCat(
        backend.name(), " has ", backend.FreeBytes(), " bytes left beside ", model->weight_bytes_,
        " bytes of weights, too few for steps of ", options.max_rows, " rows"));
  }
  return model;
}

absl::Status Model::BindWeights() {
  layers_.resize(spec_.layers.size());
  const std::vector<Slot> slots = SlotsOf(spec_, checkpoint_->format());
  std::byte* matrices = nullptr;
  if (const int64_t bytes = MatrixBytes(slots, *checkpoint_, backend_); bytes > 0) {
    matrices = owned_.emplace_back(backend_.Allocate(bytes)).data();
    if (matrices == nullptr) return absl::OkStatus();  // Load tells
  }
  for (const Slot& slot : slots) {
    const TensorInfo* tensor = checkpoint_->Find(slot.tensor);
    if (tensor == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(checkpoint_->path(), ": tensor ", slot.tensor, " is missing"));
    }
    if (tensor->shape != slot.shape) {
      return absl::InvalidArgumentError(
          absl::StrCat(tensor->file, ": tensor ", slot.tensor, " has shape [",
                       absl::StrJoin(tensor->shape, ", "), "], the config asks for [",
                       absl::StrJoin(slot.shape, ", "), "]"));
    }
    View view;
    if (slot.shape.size() == 1) {  // norms and sinks: F32, folded once
      view = View::Vector(nullptr, DType::kF32, slot.shape[0]);
      Buffer& buffer = owned_.emplace_back(backend_.Allocate(view.bytes()));
      std::vector<float> values(slot.shape[0]);
      if (!ToFloat(tensor->dtype, tensor->data.data(), values.size(), values.data())) {
        return absl::InvalidArgumentError(absl::StrCat(tensor->file, ": tensor ", slot.tensor,
                                                       " is ", Info(tensor->dtype).name,
                                                       ", a vector must be F32, F16 or BF16"));
      }
      if (slot.plus_one) {
        for (float& w : values) w += 1;
      }
      backend_.CopyIn(buffer.data(), values.data(), view.bytes());
      view.data = buffer.data();
    } else {
      view = MatrixOf(*tensor);
      if (const int64_t bytes = backend_.WeightBytes(view); bytes > 0) {
        view = backend_.PlaceWeights(view, std::exchange(matrices, matrices + Aligned(bytes)));
        checkpoint_->Forget(*tensor);
      }
    }
    weight_bytes_ += view.bytes();
    switch (slot.id) {
      case Slot::Id::kEmbedding:
        embedding_ = view;
        break;
      case Slot::Id::kFinalNorm:
        final_norm_ = view;
        break;
      case Slot::Id::kOutput:
        output_ = view;
        break;
      default:
        *layers_[slot.layer].At(slot.id) = view;
    }
  }
  if (spec_.tied_embeddings) output_ = embedding_;

  for (size_t l = 0; l < layers_.size(); ++l) {
    const auto& attention = std::get<AttentionSpec>(spec_.layers[l].mixer);
    max_heads_ = std::max(max_heads_, attention.heads);
    if (!attention.rope.has_value()) continue;
    const std::vector<float> frequencies = RopeFrequencies(*attention.rope);
    View& view = layers_[l].frequencies;
    view = View::Vector(nullptr, DType::kF32, static_cast<int64_t>(frequencies.size()));
    Buffer& buffer = owned_.emplace_back(backend_.Allocate(view.bytes()));
    backend_.CopyIn(buffer.data(), frequencies.data(), view.bytes());
    view.data = buffer.data();
  }
  return absl::OkStatus();
}

void Model::AllocateWorkspace() {
  int64_t qkv = 0, q = 0, kv = 0, intermediate = 0;
  for (const LayerSpec& layer : spec_.layers) {
    const auto& a = std::get<AttentionSpec>(layer.mixer);
    q = std::max<int64_t>(q, a.heads * a.head_dim);
    kv = std::max<int64_t>(kv, a.kv_heads * a.head_dim);
    qkv = std::max<int64_t>(qkv, (a.heads + 2 * a.kv_heads) * a.head_dim);
    if (layer.mlp.has_value())
      intermediate = std::max<int64_t>(intermediate, layer.mlp->intermediate);
  }
  work_ = std::make_unique<Workspace>();
  auto matrix = [&](int64_t rows, int64_t columns, DType dtype) {
    View view = View::Matrix(nullptr, dtype, rows, columns);
    view.data = owned_.emplace_back(backend_.Allocate(std::max<int64_t>(view.bytes(), 1))).data();
    return view;
  };
  const int64_t rows = options_.max_rows;
  const int64_t logit_rows = options_.max_logit_rows;
  work_->residual = matrix(rows, spec_.dim, DType::kF32);
  work_->normed = matrix(rows, spec_.dim, DType::kF32);
  work_->branch = matrix(rows, spec_.dim, DType::kF32);
  work_->qkv = matrix(rows, qkv, DType::kF32);
  work_->key = matrix(rows, kv, options_.cache_dtype);
  work_->value = matrix(rows, kv, options_.cache_dtype);
  work_->attention = matrix(rows, q, DType::kF32);
  work_->gate_up = matrix(rows, 2 * intermediate, DType::kF32);
  work_->activated = matrix(rows, intermediate, DType::kF32);
  work_->last = matrix(logit_rows, spec_.dim, DType::kF32);
  work_->last_normed = matrix(logit_rows, spec_.dim, DType::kF32);
  work_->logits = matrix(logit_rows, spec_.vocab, DType::kF32);
}

namespace {

// The first `rows` rows and `columns` columns of a workspace matrix, packed.
View Packed(const View& area, int64_t rows, int64_t columns) {
  return View::Matrix(area.data, area.dtype, rows, columns);
}

// Every sequence of a step has a row at least.
bool OneRowEach(const RaggedBatch& batch) { return batch.rows == batch.sequences; }

// Every sequence has one row, and all rows or none are observed: steps of one number of sequences
// are alike but for what lies in memory.
bool OnlyDecodes(const Step& step) {
  return OneRowEach(step.batch) && (step.spans.count == 0 || step.spans.count == step.batch.rows) &&
         step.logit_rows.elements() == step.batch.rows;
}

uint64_t KeyOf(const Step& step, size_t layers) {
  uint64_t key =
      absl::HashOf(step.batch.rows, step.tokens.data, step.positions.data, step.batch.row_begin,
                   step.batch.start, step.logit_rows.data, step.spans.rows, step.spans.probes,
                   step.spans.probe_offsets, step.spans.far_window, step.span_records);
  for (size_t l = 0; l < layers; ++l) {
    const KvView& cache = step.caches[l];
    key = absl::HashOf(key, cache.arena, cache.key_offset, cache.value_offset, cache.table,
                       cache.table_stride, cache.slots);
  }
  return key;
}

}  // namespace

View Model::Forward(const Step& step) {
  CHECK_GT(step.batch.rows, 0);
  CHECK_LE(step.batch.rows, options_.max_rows);
  if (!OnlyDecodes(step)) return Issue(step);
  View logits;
  const auto issue = [&] { logits = Issue(step); };
  backend_.Repeat(KeyOf(step, layers_.size()), std::ref(issue));  // a copy would be allocated
  return logits;
}

View Model::Issue(const Step& step) {
  const int64_t rows = step.batch.rows;
  const OpTable& ops = backend_.ops();
  const View residual = work_->residual.Rows(rows);

  backend_.Run(ops.Embed, {embedding_, step.tokens, residual, spec_.embedding_scale});
  backend_.Run(ops.RmsNorm, {residual, layers_[0].mixer_norm, Qkv(rows, 0).x, spec_.norm_eps});
  for (size_t l = 0; l < layers_.size(); ++l) {
    RunMixer(step, static_cast<int>(l));
    RunMlp(rows, static_cast<int>(l));
  }
  return Logits(step.logit_rows);
}

View Model::Logits(const View& rows) {
  const OpTable& ops = backend_.ops();
  const int64_t wanted = rows.elements();
  CHECK_LE(wanted, options_.max_logit_rows);
  const View logits = work_->logits.Rows(wanted);
  if (wanted == 0) return logits;
  const View last = work_->last.Rows(wanted);
  backend_.Run(ops.Gather, {work_->residual, rows, last});
  const MatMulArgs product = Product(work_->last_normed.Rows(wanted), {output_}, logits);
  backend_.Run(ops.RmsNorm, {last, final_norm_, product.x, spec_.norm_eps});
  backend_.Run(ops.MatMul, product);
  if (spec_.logit_softcap > 0) backend_.Run(ops.Softcap, {logits, spec_.logit_softcap});
  return logits;
}

MatMulArgs Model::Product(const View& x, std::initializer_list<View> parts, const View& out) const {
  MatMulArgs product{.x = x, .parts = {}, .part_count = static_cast<int>(parts.size()), .out = out};
  std::copy(parts.begin(), parts.end(), product.parts);
  product.x.dtype = backend_.ProductInput(product);
  return product;
}

MatMulArgs Model::Qkv(int64_t rows, int index) const {
  const Layer& l = layers_[index];
  return Product(work_->normed.Rows(rows), {l.q, l.k, l.v},
                 Packed(work_->qkv, rows, l.q.shape[0] + l.k.shape[0] + l.v.shape[0]));
}

MatMulArgs Model::GateUp(int64_t rows, int index) const {
  const Layer& l = layers_[index];
  MatMulArgs product = Product(work_->normed.Rows(rows), {l.gate, l.up},
                               Packed(work_->gate_up, rows, l.gate.shape[0] + l.up.shape[0]));
  // The largest activation, read once.
  if (product.x.dtype == DType::kBF16) product.out.dtype = DType::kBF16;
  return product;
}

void Model::RunMixer(const Step& step, int index) {
  const OpTable& ops = backend_.ops();
  const Layer& layer = layers_[index];
  const auto& a = std::get<AttentionSpec>(spec_.layers[index].mixer);
  const int64_t rows = step.batch.rows;
  const int64_t q_columns = static_cast<int64_t>(a.heads) * a.head_dim;
  const int64_t kv_columns = static_cast<int64_t>(a.kv_heads) * a.head_dim;

  const MatMulArgs product = Qkv(rows, index);
  const View& qkv = product.out;
  backend_.Run(ops.MatMul, product);
  // In the cache's dtype before attention sees them, so that a key counts the same in flight and
  // cached; one row a sequence goes there at once, where many would displace what some still see.
  const bool stores = OneRowEach(step.batch);
  const View key = Packed(work_->key, rows, kv_columns).Heads(a.kv_heads);
  const View value = Packed(work_->value, rows, kv_columns).Heads(a.kv_heads);
  backend_.Run(ops.PrepareQkv, {.qkv = qkv,
                                .query_norm = layer.q_norm,
                                .key_norm = layer.k_norm,
                                .positions = step.positions,
                                .frequencies = layer.frequencies,
                                .key = key,
                                .value = value,
                                .cache = stores ? step.caches[index] : KvView(),
                                .interleaved = a.rope.has_value() && a.rope->interleaved,
                                .eps = spec_.norm_eps});

  MatMulArgs output =
      Product(Packed(work_->attention, rows, q_columns), {layer.o}, work_->branch.Rows(rows));
  // Attention makes heads, which need not be whole groups.
  if (output.x.dtype == DType::kI8) output.x.dtype = DType::kF32;
  SpanRequest spans = step.spans;
  if (spans.count > 0) {
    spans.records = step.span_records + static_cast<int64_t>(index) * spans.count * max_heads_;
  }
  backend_.Run(ops.Attention, {.query = qkv.Columns(0, q_columns).Heads(a.heads),
                               .key = key,
                               .value = value,
                               .out = output.x.Heads(a.heads),
                               .cache = step.caches[index],
                               .batch = step.batch,
                               .scale = a.scale,
                               .window = a.window.value_or(0),
                               .softcap = a.softcap,
                               .sinks = layer.sinks,
                               .spans = spans});
  if (!stores) {
    backend_.Run(ops.StoreKv, {key, value, step.caches[index], step.batch, a.window.value_or(0)});
  }

  backend_.Run(ops.MatMul, output);
  AddBranch(rows, layer.mixer_post_norm, layer.mlp_norm, GateUp(rows, index).x);
}

void Model::RunMlp(int64_t rows, int index) {
  const OpTable& ops = backend_.ops();
  const Layer& layer = layers_[index];
  const MlpSpec& mlp = *spec_.layers[index].mlp;
  const MatMulArgs product = GateUp(rows, index);
  const MatMulArgs down = Product(Packed(work_->activated, rows, mlp.intermediate), {layer.down},
                                  work_->branch.Rows(rows));
  backend_.Run(ops.GatedMatMul, {product, down.x, mlp.activation});
  backend_.Run(ops.MatMul, down);
  if (static_cast<size_t>(index) + 1 < layers_.size()) {
    AddBranch(rows, layer.mlp_post_norm, layers_[index + 1].mixer_norm, Qkv(rows, index + 1).x);
  } else {  // the final norm takes only rows that need logits
    AddBranch(rows, layer.mlp_post_norm, {}, {});
  }
}

void Model::AddBranch(int64_t rows, const View& post_norm, const View& next_norm,
                      const View& normed) {
  backend_.Run(backend_.ops().AddRmsNorm, {.x = work_->branch.Rows(rows),
                                           .x_weight = post_norm,
                                           .residual = work_->residual.Rows(rows),
                                           .weight = next_norm,
                                           .out = normed,
                                           .eps = spec_.norm_eps});
}

}  // namespace longspan
