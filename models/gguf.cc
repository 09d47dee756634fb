#include "models/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/checkpoint_file.h"
#include "models/checkpoint_json.h"

namespace longspan {
namespace {

constexpr uint32_t kVersion = 3;
constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMaxAlignment = 1 << 20;
constexpr uint64_t kMaxKeyBytes = 65535;
constexpr uint64_t kMaxArrayValues = 1 << 24;  // of all arrays together: small text must not grow
constexpr uint32_t kMaxDims = 4;
constexpr uint64_t kMinEntryBytes = 8 + 4 + 1;           // empty key, type, the smallest value
constexpr uint64_t kMinTensorBytes = 8 + 4 + 8 + 4 + 8;  // empty name, rank, one dim, type, offset

enum class ValueType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

// What one value of the type takes at least in the file; 0 for an unknown type.
uint64_t MinBytes(ValueType type) {
  switch (type) {
    case ValueType::kU8:
    case ValueType::kI8:
    case ValueType::kBool:
      return 1;
    case ValueType::kU16:
    case ValueType::kI16:
      return 2;
    case ValueType::kU32:
    case ValueType::kI32:
    case ValueType::kF32:
      return 4;
    case ValueType::kU64:
    case ValueType::kI64:
    case ValueType::kF64:
    case ValueType::kString:
      return 8;
    case ValueType::kArray:
      return 12;
  }
  return 0;
}

struct TensorType {
  uint32_t id;
  const char* name;
  std::optional<DType> dtype;  // nullopt: known by name only
};
constexpr TensorType kTensorTypes[] = {
    {0, "F32", DType::kF32},
    {1, "F16", DType::kF16},
    {2, "Q4_0", DType::kQ4_0},
    {3, "Q4_1", {}},
    {6, "Q5_0", DType::kQ5_0},
    {7, "Q5_1", {}},
    {8, "Q8_0", DType::kQ8_0},
    {9, "Q8_1", {}},
    {10, "Q2_K", {}},
    {11, "Q3_K", {}},
    {12, "Q4_K", DType::kQ4_K},
    {13, "Q5_K", DType::kQ5_K},
    {14, "Q6_K", DType::kQ6_K},
    {15, "Q8_K", {}},
    {16, "IQ2_XXS", {}},
    {17, "IQ2_XS", {}},
    {18, "IQ3_XXS", {}},
    {19, "IQ1_S", {}},
    {20, "IQ4_NL", {}},
    {21, "IQ3_S", {}},
    {22, "IQ2_S", {}},
    {23, "IQ4_XS", {}},
    {24, "I8", {}},
    {25, "I16", {}},
    {26, "I32", {}},
    {27, "I64", {}},
    {28, "F64", {}},
    {29, "IQ1_M", {}},
    {30, "BF16", DType::kBF16},
    {34, "TQ1_0", {}},
    {35, "TQ2_0", {}},
    {39, "MXFP4", {}},
};

// Reads little-endian values in order; the first failure sticks and every later read yields zero.
class Reader {
 public:
  Reader(absl::Span<const std::byte> file, absl::string_view path) : file_(file), path_(path) {}

  size_t position() const { return position_; }
  uint64_t remaining() const { return file_.size() - position_; }
  bool ok() const { return status_.ok(); }
  const absl::Status& status() const { return status_; }

  template <class... Parts>
  void Fail(const Parts&... parts) {
    status_.Update(absl::InvalidArgumentError(absl::StrCat(path_, ": ", parts...)));
  }

  template <class T>
  T Value(absl::string_view what) {
    T value{};
    if (!ok()) return value;
    if (remaining() < sizeof(T)) {
      Fail(what, " needs ", sizeof(T), " bytes at byte ", position_, ", the file has ", remaining(),
           " left");
      return value;
    }
    std::memcpy(&value, file_.data() + position_, sizeof(T));
    position_ += sizeof(T);
    return value;
  }

  std::string String(absl::string_view what) {
    const uint64_t length = Value<uint64_t>(what);
    if (!ok()) return "";
    if (length > remaining()) {
      Fail(what, " of ", length, " bytes at byte ", position_, ", the file has ", remaining(),
           " left");
      return "";
    }
    std::string text(reinterpret_cast<const char*>(file_.data()) + position_, length);
    position_ += length;
    return text;
  }

 private:
  absl::Span<const std::byte> file_;
  absl::string_view path_;
  size_t position_ = 0;
  absl::Status status_;
};

bool ReadBool(Reader& in, absl::string_view what) {
  const auto value = in.Value<uint8_t>(what);
  if (value > 1) in.Fail(what, " is ", static_cast<int>(value), ", a bool is 0 or 1");
  return value == 1;
}

template <class Stored, class Read>
GgufValue ReadMany(uint64_t count, Reader& in, const Read& read) {
  std::vector<Stored> values;
  values.reserve(count);
  for (uint64_t i = 0; i < count && in.ok(); ++i) values.push_back(read());
  return values;
}

// Calls `visit` with a reader of one value of the type: visit(Stored{}, read).
template <class Visit>
GgufValue WithType(ValueType type, Reader& in, absl::string_view what, const Visit& visit) {
  const auto as = [&](auto raw, auto stored) {
    using Raw = decltype(raw);
    using Stored = decltype(stored);
    return visit(stored, [&in, what] { return static_cast<Stored>(in.Value<Raw>(what)); });
  };
  switch (type) {
    case ValueType::kU8:
      return as(uint8_t{}, uint64_t{});
    case ValueType::kU16:
      return as(uint16_t{}, uint64_t{});
    case ValueType::kU32:
      return as(uint32_t{}, uint64_t{});
    case ValueType::kU64:
      return as(uint64_t{}, uint64_t{});
    case ValueType::kI8:
      return as(int8_t{}, int64_t{});
    case ValueType::kI16:
      return as(int16_t{}, int64_t{});
    case ValueType::kI32:
      return as(int32_t{}, int64_t{});
    case ValueType::kI64:
      return as(int64_t{}, int64_t{});
    case ValueType::kF32:
      return as(float{}, double{});
    case ValueType::kF64:
      return as(double{}, double{});
    case ValueType::kBool:
      return visit(bool{}, [&in, what] { return ReadBool(in, what); });
    case ValueType::kString:
      return visit(std::string(), [&in, what] { return in.String(what); });
    case ValueType::kArray:
      break;
  }
  in.Fail(what, " has type ", static_cast<uint32_t>(type), ", which is not one that can be read");
  return uint64_t{0};
}

class Parser {
 public:
  Parser(absl::Span<const std::byte> file, absl::string_view path)
      : file_(file), path_(path), in_(file, path) {}

  absl::StatusOr<GgufFile> Parse() {
    uint64_t tensors = 0;
    uint64_t entries = 0;
    ReadHeader(&tensors, &entries);
    for (uint64_t i = 0; i < entries && in_.ok(); ++i) ReadEntry();
    ReadAlignment();
    // The table below its count: a large claim was compared with the bytes left before this.
    if (in_.ok() && tensors > in_.remaining() / kMinTensorBytes) {
      in_.Fail(tensors, " tensors, the ", in_.remaining(), " bytes left can hold at most ",
               in_.remaining() / kMinTensorBytes);
    }
    for (uint64_t i = 0; i < tensors && in_.ok(); ++i) ReadTensor();
    if (in_.ok() && tensors > 0) PlaceTensors();
    if (!in_.ok()) return in_.status();
    return std::move(out_);
  }

 private:
  struct Extent {
    uint64_t offset = 0;  // from the start of the data
    uint64_t bytes = 0;
  };

  void ReadHeader(uint64_t* tensors, uint64_t* entries) {
    const auto magic = in_.Value<uint32_t>("magic");
    if (in_.ok() && magic != 0x46554747) {
      in_.Fail("the file does not start with \"GGUF\"");
    }
    const auto version = in_.Value<uint32_t>("version");
    if (in_.ok() && version != kVersion) {
      in_.Fail("GGUF version ", version, ", version ", kVersion, " is read",
               version == __builtin_bswap32(kVersion) ? " (little-endian files only)" : "");
    }
    *tensors = in_.Value<uint64_t>("tensor count");
    *entries = in_.Value<uint64_t>("metadata count");
    if (in_.ok() && *entries > in_.remaining() / kMinEntryBytes) {
      in_.Fail(*entries, " metadata entries, the ", in_.remaining(),
               " bytes left can hold at most ", in_.remaining() / kMinEntryBytes);
    }
    if (in_.ok() && *tensors > in_.remaining() / kMinTensorBytes) {
      in_.Fail(*tensors, " tensors, the ", in_.remaining(), " bytes left can hold at most ",
               in_.remaining() / kMinTensorBytes);
    }
  }

  void ReadEntry() {
    const std::string key = in_.String("metadata key");
    if (!in_.ok()) return;
    if (key.empty() || key.size() > kMaxKeyBytes) {
      in_.Fail("metadata key of ", key.size(), " bytes, it must have 1 to ", kMaxKeyBytes);
      return;
    }
    if (out_.metadata.contains(key)) {
      in_.Fail("metadata key ", Quoted(key), " appears twice");
      return;
    }
    const std::string what = absl::StrCat("metadata ", Quoted(key));
    const auto type = static_cast<ValueType>(in_.Value<uint32_t>(what));
    if (!in_.ok()) return;
    GgufValue value =
        type == ValueType::kArray
            ? ReadArray(what)
            : WithType(type, in_, what, [](auto, const auto& read) -> GgufValue { return read(); });
    out_.metadata.emplace(key, std::move(value));
  }

  GgufValue ReadArray(const std::string& what) {
    const auto type = static_cast<ValueType>(in_.Value<uint32_t>(what));
    const auto count = in_.Value<uint64_t>(what);
    if (!in_.ok()) return uint64_t{0};
    if (MinBytes(type) == 0 || type == ValueType::kArray) {
      in_.Fail(what, " is an array of type ", static_cast<uint32_t>(type),
               ", which is not one that can be read");
      return uint64_t{0};
    }
    if (count > in_.remaining() / MinBytes(type)) {
      in_.Fail(what, " has ", count, " values, the ", in_.remaining(),
               " bytes left can hold at most ", in_.remaining() / MinBytes(type));
      return uint64_t{0};
    }
    if (count > kMaxArrayValues - array_values_) {
      in_.Fail(what, " has ", count, " values, with ", array_values_,
               " before it; the limit for all arrays is ", kMaxArrayValues);
      return uint64_t{0};
    }
    array_values_ += count;
    return WithType(type, in_, what, [&](auto stored, const auto& read) -> GgufValue {
      return ReadMany<decltype(stored)>(count, in_, read);
    });
  }

  void ReadAlignment() {
    const auto it = out_.metadata.find("general.alignment");
    if (!in_.ok() || it == out_.metadata.end()) return;
    const uint64_t* value = std::get_if<uint64_t>(&it->second);
    if (value == nullptr) {
      in_.Fail("metadata \"general.alignment\" is not an unsigned number");
    } else if (*value < 8 || *value > kMaxAlignment || (*value & (*value - 1)) != 0) {
      in_.Fail("metadata \"general.alignment\" is ", *value,
               ", it must be a power of two from 8 to ", kMaxAlignment);
    } else {
      alignment_ = *value;
    }
  }

  void ReadTensor() {
    TensorInfo tensor;
    tensor.name = in_.String("tensor name");
    tensor.file = std::string(path_);
    if (!in_.ok()) return;
    const std::string what = absl::StrCat("tensor ", Quoted(tensor.name));
    if (tensor.name.empty() || tensor.name.size() > kMaxKeyBytes) {
      in_.Fail("tensor name of ", tensor.name.size(), " bytes, it must have 1 to ", kMaxKeyBytes);
      return;
    }
    if (!names_.insert(tensor.name).second) {
      in_.Fail(what, " appears twice");
      return;
    }
    const auto rank = in_.Value<uint32_t>(what);
    if (in_.ok() && (rank < 1 || rank > kMaxDims)) {
      in_.Fail(what, " has ", rank, " dimensions, it must have 1 to ", kMaxDims);
    }
    for (uint32_t i = 0; i < rank && in_.ok(); ++i) {
      const auto n = in_.Value<uint64_t>(what);
      if (in_.ok() && (n < 1 || n > static_cast<uint64_t>(INT64_MAX))) {
        in_.Fail(what, " has a dimension of ", n, ", it must be from 1 to ", INT64_MAX);
      }
      tensor.shape.push_back(static_cast<int64_t>(n));
    }
    const auto type = in_.Value<uint32_t>(what);
    Extent extent;
    extent.offset = in_.Value<uint64_t>(what);
    if (!in_.ok()) return;
    SetType(type, what, &tensor);
    SetBytes(what, &tensor, &extent);
    std::reverse(tensor.shape.begin(), tensor.shape.end());
    out_.tensors.push_back(std::move(tensor));
    extents_.push_back(extent);
  }

  void SetType(uint32_t id, const std::string& what, TensorInfo* tensor) {
    const auto* known = std::find_if(std::begin(kTensorTypes), std::end(kTensorTypes),
                                     [id](const TensorType& t) { return t.id == id; });
    if (known != std::end(kTensorTypes) && known->dtype) {
      tensor->dtype = *known->dtype;
      return;
    }
    in_.Fail(
        what, " has type ", id,
        known == std::end(kTensorTypes) ? "" : absl::StrCat(" (", known->name, ")"),
        ", which is not supported (F32, F16, BF16, Q8_0, Q4_0, Q5_0, Q4_K, Q5_K and Q6_K are)");
  }

  // Bytes of the tensor from its shape (fastest dimension first here), every product checked.
  void SetBytes(const std::string& what, TensorInfo* tensor, Extent* extent) {
    if (!in_.ok()) return;
    const DTypeInfo info = Info(tensor->dtype);
    uint64_t elements = 1;
    for (const int64_t n : tensor->shape) {
      if (__builtin_mul_overflow(elements, static_cast<uint64_t>(n), &elements) ||
          elements > static_cast<uint64_t>(INT64_MAX)) {
        in_.Fail(what, " of shape [", absl::StrJoin(tensor->shape, ", "), "] has more than ",
                 INT64_MAX, " elements");
        return;
      }
    }
    if (tensor->shape[0] % info.block_elements != 0) {
      in_.Fail(what, " has rows of ", tensor->shape[0], " elements, not a multiple of ", info.name,
               "'s block of ", info.block_elements);
      return;
    }
    if (__builtin_mul_overflow(elements / static_cast<uint64_t>(info.block_elements),
                               static_cast<uint64_t>(info.block_bytes), &extent->bytes)) {
      in_.Fail(what, ": ", elements, " elements of ", info.name, " overflow 64 bits of bytes");
    }
  }

  void PlaceTensors() {
    // Compared before it is rounded up: the sum cannot wrap.
    const uint64_t padding = (alignment_ - in_.position() % alignment_) % alignment_;
    if (padding > in_.remaining()) {
      in_.Fail("the tensor table ends at byte ", in_.position(), ", aligned to ", alignment_,
               " the data would start beyond the file's ", file_.size(), " bytes");
      return;
    }
    const absl::Span<const std::byte> data = file_.subspan(in_.position() + padding);
    for (size_t i = 0; i < extents_.size(); ++i) {
      const auto [offset, bytes] = extents_[i];
      const std::string what = absl::StrCat("tensor ", Quoted(out_.tensors[i].name));
      if (offset % alignment_ != 0) {
        in_.Fail(what, " starts at offset ", offset, ", not a multiple of the alignment ",
                 alignment_);
        return;
      }
      if (offset > data.size() || bytes > data.size() - offset) {
        in_.Fail(what, " takes ", bytes, " bytes at offset ", offset, ", the file has ",
                 data.size(), " bytes of data");
        return;
      }
      out_.tensors[i].data = data.subspan(offset, bytes);
    }
    CheckOverlap();
  }

  void CheckOverlap() {
    std::vector<size_t> order(extents_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(),
              [&](size_t a, size_t b) { return extents_[a].offset < extents_[b].offset; });
    for (size_t i = 1; i < order.size(); ++i) {
      const Extent& before = extents_[order[i - 1]];
      const Extent& here = extents_[order[i]];
      if (here.offset < before.offset + before.bytes) {
        in_.Fail("tensor ", Quoted(out_.tensors[order[i]].name), " starts at offset ", here.offset,
                 ", inside tensor ", Quoted(out_.tensors[order[i - 1]].name), " that ends at ",
                 before.offset + before.bytes);
        return;
      }
    }
  }

  absl::Span<const std::byte> file_;
  absl::string_view path_;
  Reader in_;
  GgufFile out_;
  std::vector<Extent> extents_;  // beside out_.tensors
  absl::flat_hash_set<std::string> names_;
  uint64_t alignment_ = kDefaultAlignment;
  uint64_t array_values_ = 0;
};

class GgufCheckpoint : public Checkpoint {
 public:
  GgufCheckpoint(std::string path, MappedFile file, GgufFile parsed)
      : Checkpoint(std::move(path)), file_(std::move(file)), metadata_(std::move(parsed.metadata)) {
    for (TensorInfo& tensor : parsed.tensors) {
      const std::string name = tensor.name;
      tensors_.emplace(name, std::move(tensor));
    }
  }

  Format format() const override { return Format::kGguf; }
  const GgufMetadata& gguf() const override { return metadata_; }
  absl::StatusOr<std::string> ReadSideFile(absl::string_view) const override {
    return std::string();
  }
  void Forget(const TensorInfo& tensor) const override { file_.Forget(tensor.data); }

 private:
  MappedFile file_;
  GgufMetadata metadata_;
};

}  // namespace

absl::StatusOr<GgufFile> ParseGguf(absl::Span<const std::byte> file, absl::string_view path) {
  return Parser(file, path).Parse();
}

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGgufFile(const std::string& path) {
  absl::StatusOr<MappedFile> file = MappedFile::Open(path);
  if (!file.ok()) return file.status();
  absl::StatusOr<GgufFile> parsed = ParseGguf(file->bytes(), path);
  if (!parsed.ok()) return parsed.status();
  return std::make_unique<GgufCheckpoint>(path, *std::move(file), *std::move(parsed));
}

}  // namespace longspan
