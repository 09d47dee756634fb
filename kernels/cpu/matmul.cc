// MatMul: shares the outputs of all parts among the threads, and decides for float weights whether
// to multiply straight from them (few rows) or from weights widened once for many rows.
#include <algorithm>
#include <cstring>

#include "kernels/check.h"
#include "kernels/cpu/blocks.h"
#include "kernels/cpu/context.h"
#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/matmul_kernels.h"
#include "kernels/cpu/ops_cpu.h"

namespace longspan::cpu {

const FloatKernels* FloatKernelsOf(const MatMulKernels& kernels, DType type) {
  switch (type) {
    case DType::kF32:
      return &kernels.f32;
    case DType::kF16:
      return &kernels.f16;
    case DType::kBF16:
      return &kernels.bf16;
    default:
      return nullptr;
  }
}

const BlockKernels* BlockKernelsOf(const MatMulKernels& kernels, DType type) {
  switch (type) {
    case DType::kQ8_0:
      return &kernels.q8_0;
    case DType::kQ4_0:
      return &kernels.q4_0;
    case DType::kQ5_0:
      return &kernels.q5_0;
    case DType::kQ4_K:
      return &kernels.q4_k;
    case DType::kQ5_K:
      return &kernels.q5_k;
    case DType::kQ6_K:
      return &kernels.q6_k;
    default:
      return nullptr;
  }
}

namespace {

// Fewer rows than these are multiplied straight from the stored weights: converting them first
// costs about as much as these rows' products.
constexpr int64_t kRowsToWiden = 48;
// Pieces taken at once: few enough that a late thread's share can be taken by others.
constexpr int64_t kChunksPerThread = 32, kMostPieces = 8;
// Rows below which a second loop over the team costs more than it saves.
constexpr int64_t kRowsToShareQuantising = 4;

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Memory of one call, cut from a scratch area that is first measured (base nullptr), then used.
struct Carver {
  std::byte* base = nullptr;
  size_t used = 0;
  template <class T>
  T* Take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += RoundUp(count * sizeof(T), 64);
    return piece;
  }
};

PanelMemory CarvePanel(Carver& carver, int64_t in) {
  return {.levels = carver.Take<uint8_t>(kPanel * in),
          .scales = carver.Take<float>(kPanel * in / 16),
          .mins = carver.Take<float>(kPanel * in / 16)};
}

class Product {
 public:
  Product(BackendContext& context, const MatMulArgs& args)
      : context_(context), args_(args), kernels_(SetOf(context.simd).matmul) {
    rows_ = args.x.shape[0];
    in_ = args.x.shape[1];
    padded_ = RoundUp(in_, kFloatPadding);
    rounded_padded_ = RoundUp(in_, kBf16Padding);
    Check();
    for (int p = 0; p < args.part_count; ++p) {
      column_begin_[p + 1] = column_begin_[p] + args.parts[p].shape[0];
      width_[p] = IsQuantised(args.parts[p].dtype) ? kPanel : kernels_.float_columns;
      piece_begin_[p + 1] = piece_begin_[p] + (args.parts[p].shape[0] + width_[p] - 1) / width_[p];
    }
    CHECK_EQ(args.out.shape[1], column_begin_[args.part_count]);
  }

  void Compute() {
    if (rows_ == 0) return;
    PrepareRows();
    const int64_t pieces = piece_begin_[args_.part_count];
    const int64_t grain =
        std::clamp<int64_t>(pieces / (kChunksPerThread * context_.team.threads()), 1, kMostPieces);
    context_.team.For(pieces, grain, [this](int64_t begin, int64_t end, int thread) {
      for (int p = 0; p < args_.part_count; ++p) {
        const int64_t first = std::max(begin, piece_begin_[p]);
        const int64_t last = std::min(end, piece_begin_[p + 1]);
        if (first >= last) continue;
        ComputePart(p, first - piece_begin_[p], last - piece_begin_[p], thread);
      }
    });
  }

 private:
  void Check() const {
    CHECK(args_.part_count >= 1 && args_.part_count <= 3) << args_.part_count;
    CHECK(args_.x.dtype == DType::kF32 || args_.x.dtype == ProductInput(args_))
        << Info(args_.x.dtype).name;
    CHECK(args_.out.dtype == DType::kF32);
    CHECK_EQ(args_.out.shape[0], rows_);
    for (int p = 0; p < args_.part_count; ++p) {
      const View& part = args_.parts[p];
      CHECK_EQ(part.shape[1], in_);
      CHECK_EQ(in_ % Info(part.dtype).block_elements, 0) << Info(part.dtype).name;
      CHECK(FloatKernelsOf(kernels_, part.dtype) != nullptr ||
            BlockKernelsOf(kernels_, part.dtype) != nullptr)
          << Info(part.dtype).name << " is not a weight type";
      CHECK_EQ(part.packed, IsQuantised(part.dtype)) << "blocks are multiplied from panels";
    }
  }

  // Whether a part takes x rounded to BF16.
  bool Rounds(const View& part) const {
    return part.dtype == DType::kBF16 && kernels_.rounded_bf16.multiply != nullptr;
  }

  // Quantises, rounds and pads the rows of x as the parts' types need it, once for all of them.
  void PrepareRows() {
    if (args_.x.dtype == DType::kI8) {
      quantised_ = QuantisedRows::At(args_.x.data, rows_, in_);
      return;
    }
    bool blocks = false, floats = false, rounded = false;
    for (int p = 0; p < args_.part_count; ++p) {
      const View& part = args_.parts[p];
      (IsQuantised(part.dtype) ? blocks : Rounds(part) ? rounded : floats) = true;
    }
    const bool pad = floats && padded_ != in_;
    Carver carver;
    std::byte* quantised = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      if (blocks) quantised = carver.Take<std::byte>(QuantisedRows::Bytes(rows_, in_));
      if (pad) padded_x_ = carver.Take<float>(rows_ * padded_);
      if (rounded) rounded_x_ = carver.Take<uint16_t>(rows_ * rounded_padded_);
      if (pass == 0) carver = {context_.SharedScratch(carver.used), 0};
    }
    if (blocks) quantised_ = QuantisedRows::At(quantised, rows_, in_);
    x_ = pad ? padded_x_ : args_.x.as<const float>();
    x_stride_ = pad ? padded_ : args_.x.stride[0];
    if (!blocks && !pad && !rounded) return;
    const int64_t grain = rows_ < kRowsToShareQuantising
                              ? rows_
                              : std::max<int64_t>(1, rows_ / (4 * context_.team.threads()));
    context_.team.For(rows_, grain, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r) {
        const float* row = args_.x.as<const float>() + r * args_.x.stride[0];
        if (blocks) kernels_.quantise(row, in_, quantised_.Row(r, in_));
        if (pad) {
          float* to = padded_x_ + r * padded_;
          std::copy_n(row, in_, to);
          std::fill(to + in_, to + padded_, 0.0f);
        }
        if (rounded) {
          uint16_t* to = rounded_x_ + r * rounded_padded_;
          kernels_.rounded_bf16.round(row, in_, to);
          std::fill(to + in_, to + rounded_padded_, uint16_t{0});
        }
      }
    });
  }

  void ComputePart(int p, int64_t first, int64_t last, int thread) {
    const View& part = args_.parts[p];
    const int64_t begin = first * width_[p];
    const int64_t end = std::min(last * width_[p], part.shape[0]);
    float* out = args_.out.as<float>() + column_begin_[p];
    if (Rounds(part)) {
      ComputeRounded(part, begin, end, out, thread);
    } else if (const FloatKernels* floats = FloatKernelsOf(kernels_, part.dtype)) {
      ComputeFloat(*floats, part, begin, end, out, thread);
    } else {
      ComputeBlocks(*BlockKernelsOf(kernels_, part.dtype), part, begin, end, out, thread);
    }
  }

  void ComputeFloat(const FloatKernels& kernels, const View& part, int64_t begin, int64_t end,
                    float* out, int thread) {
    FloatTile tile = {.x = x_,
                      .x_stride = x_stride_,
                      .rows = rows_,
                      .weights = part.row(begin),
                      .weight_stride = BytesOf(part.dtype, part.stride[0]),
                      .columns = end - begin,
                      .in = padded_,
                      .cold = true,
                      .out = out + begin,
                      .out_stride = args_.out.stride[0]};
    const bool widen = rows_ >= kRowsToWiden && part.dtype != DType::kF32;
    if (!widen && padded_ == in_) {
      kernels.multiply(tile);
      return;
    }
    auto* wide = reinterpret_cast<float*>(
        context_.Scratch(thread, kernels_.float_columns * padded_ * sizeof(float)));
    tile.cold = false;
    for (int64_t c = begin; c < end; c += kernels_.float_columns) {
      tile.columns = std::min<int64_t>(kernels_.float_columns, end - c);
      for (int64_t i = 0; i < tile.columns; ++i) {
        kernels.widen(part.row(c + i), in_, wide + i * padded_);
        std::fill(wide + i * padded_ + in_, wide + (i + 1) * padded_, 0.0f);
      }
      tile.weights = reinterpret_cast<const std::byte*>(wide);
      tile.weight_stride = padded_ * sizeof(float);
      tile.out = out + c;
      kernels_.f32.multiply(tile);
    }
  }

  void ComputeRounded(const View& part, int64_t begin, int64_t end, float* out, int thread) {
    Bf16Tile tile = {.x = rounded_x_,
                     .x_stride = rounded_padded_,
                     .rows = rows_,
                     .weights = part.row(begin),
                     .weight_stride = BytesOf(part.dtype, part.stride[0]),
                     .columns = end - begin,
                     .in = rounded_padded_,
                     .cold = true,
                     .out = out + begin,
                     .out_stride = args_.out.stride[0]};
    if (rounded_padded_ != in_) {
      auto* padded = reinterpret_cast<uint16_t*>(
          context_.Scratch(thread, tile.columns * rounded_padded_ * sizeof(uint16_t)));
      for (int64_t c = 0; c < tile.columns; ++c) {
        uint16_t* to = padded + c * rounded_padded_;
        std::memcpy(to, part.row(begin + c), in_ * sizeof(uint16_t));
        std::fill(to + in_, to + rounded_padded_, uint16_t{0});
      }
      tile.weights = reinterpret_cast<const std::byte*>(padded);
      tile.weight_stride = rounded_padded_ * sizeof(uint16_t);
      tile.cold = false;
    }
    kernels_.rounded_bf16.multiply(tile);
  }

  void ComputeBlocks(const BlockKernels& kernels, const View& part, int64_t begin, int64_t end,
                     float* out, int thread) {
    Carver carver;
    CarvePanel(carver, in_);
    carver = {context_.Scratch(thread, carver.used), 0};
    const int64_t panel_bytes = PackedPanelBytes(part.dtype, in_);
    BlockTile tile = {.panel = part.as<const uint8_t>() + begin / kPanel * panel_bytes,
                      .scratch = CarvePanel(carver, in_),
                      .x = quantised_,
                      .rows = rows_,
                      .in = in_,
                      .columns = 0,
                      .out = out + begin,
                      .out_stride = args_.out.stride[0]};
    for (int64_t c = begin; c < end; c += kPanel, tile.panel += panel_bytes, tile.out += kPanel) {
      tile.columns = std::min<int64_t>(kPanel, end - c);
      kernels.multiply(tile);
    }
  }

  BackendContext& context_;
  const MatMulArgs& args_;
  const MatMulKernels& kernels_;
  int64_t rows_, in_, padded_, rounded_padded_;
  int64_t column_begin_[4] = {};  // first output column of each part
  int64_t piece_begin_[4] = {};   // first piece of each part
  int width_[3] = {};             // columns of a part's piece
  QuantisedRows quantised_ = {};
  float* padded_x_ = nullptr;
  const float* x_ = nullptr;
  int64_t x_stride_ = 0;
  uint16_t* rounded_x_ = nullptr;
};

}  // namespace

DType ProductInput(const MatMulArgs& product) {
  const bool blocks = std::all_of(product.parts, product.parts + product.part_count,
                                  [](const View& part) { return IsQuantised(part.dtype); });
  return blocks && product.x.stride[0] == product.x.shape[1] ? DType::kI8 : DType::kF32;
}

void MatMul(BackendContext& context, const MatMulArgs& args) { Product(context, args).Compute(); }

View PackWeights(BackendContext& context, const View& matrix, std::byte* to) {
  const BlockKernels* kernels = BlockKernelsOf(SetOf(context.simd).matmul, matrix.dtype);
  CHECK(kernels != nullptr && !matrix.packed) << Info(matrix.dtype).name;
  const int64_t rows = matrix.shape[0], in = matrix.shape[1];
  const int64_t panel_bytes = PackedPanelBytes(matrix.dtype, in);
  context.team.For((rows + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end, int) {
    const std::byte* outputs[kPanel];
    for (int64_t p = begin; p < end; ++p) {
      for (int o = 0; o < kPanel; ++o) {
        outputs[o] = matrix.row(std::min(p * kPanel + o, rows - 1));
      }
      kernels->pack(outputs, in, reinterpret_cast<uint8_t*>(to) + p * panel_bytes);
    }
  });
  View packed = matrix;
  packed.data = to;
  packed.packed = true;
  return packed;
}

}  // namespace longspan::cpu
