#include "models/safetensors.h"

#include <algorithm>
#include <filesystem>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "models/checkpoint_file.h"
#include "models/checkpoint_json.h"

namespace longspan {
namespace {

using nlohmann::json;

constexpr size_t kMaxSideFile = 16 << 20;
constexpr JsonLimits kHeaderLimits = {.depth = 4, .values = 4'000'000};
constexpr JsonLimits kIndexLimits = {.depth = 8, .values = 1'000'000};

template <class... Parts>
absl::Status Refuse(absl::string_view file, const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(file, ": ", parts...));
}

// One header entry whose dtype, shape and offsets are read but not yet placed.
struct Entry {
  TensorInfo tensor;
  uint64_t begin = 0;
  uint64_t end = 0;
};

absl::StatusOr<DType> ReadDType(const json& value, absl::string_view file, absl::string_view name) {
  static const std::map<std::string, DType, std::less<>> kKnown = {
      {"F32", DType::kF32}, {"F16", DType::kF16}, {"BF16", DType::kBF16}};
  if (!value.is_string()) return Refuse(file, "tensor ", Quoted(name), ": dtype is not a string");
  const auto& text = value.get_ref<const std::string&>();
  const auto it = kKnown.find(text);
  if (it != kKnown.end()) return it->second;
  return Refuse(file, "tensor ", Quoted(name), ": dtype ", Quoted(text),
                " is not supported (F32, F16 and BF16 are)");
}

// Elements of the shape, every product checked.
absl::StatusOr<uint64_t> ReadShape(const json& value, absl::string_view file, TensorInfo* tensor) {
  const std::string where = absl::StrCat("tensor ", Quoted(tensor->name), ": shape");
  if (!value.is_array()) return Refuse(file, where, " is not an array");
  if (value.size() > kMaxTensorRank) {
    return Refuse(file, where, " has ", value.size(), " dimensions, the limit is ", kMaxTensorRank);
  }
  uint64_t elements = 1;
  for (const json& dim : value) {
    if (!dim.is_number_unsigned()) return Refuse(file, where, " holds ", Quoted(dim.dump()));
    const uint64_t n = dim.get<uint64_t>();
    if (__builtin_mul_overflow(elements, n, &elements) || n > INT64_MAX || elements > INT64_MAX) {
      return Refuse(file, where, " ", Quoted(value.dump()), " has more than ", INT64_MAX,
                    " elements");
    }
    tensor->shape.push_back(static_cast<int64_t>(n));
  }
  return elements;
}

absl::StatusOr<Entry> ReadEntry(const std::string& name, const json& value,
                                absl::string_view file) {
  Entry entry;
  entry.tensor.name = name;
  entry.tensor.file = std::string(file);
  if (!value.is_object()) return Refuse(file, "tensor ", Quoted(name), ": not an object");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!value.contains(key)) return Refuse(file, "tensor ", Quoted(name), ": no ", key);
  }
  if (value.size() != 3) {
    return Refuse(file, "tensor ", Quoted(name), ": ", value.size(),
                  " keys, expected dtype, shape and data_offsets");
  }
  absl::StatusOr<DType> dtype = ReadDType(value["dtype"], file, name);
  if (!dtype.ok()) return dtype.status();
  entry.tensor.dtype = *dtype;
  absl::StatusOr<uint64_t> elements = ReadShape(value["shape"], file, &entry.tensor);
  if (!elements.ok()) return elements.status();
  const json& offsets = value["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return Refuse(file, "tensor ", Quoted(name), ": data_offsets is ", Quoted(offsets.dump()),
                  ", not two offsets");
  }
  entry.begin = offsets[0].get<uint64_t>();
  entry.end = offsets[1].get<uint64_t>();
  if (entry.end < entry.begin) {
    return Refuse(file, "tensor ", Quoted(name), ": data_offsets end ", entry.end,
                  " before they begin ", entry.begin);
  }
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(*elements, static_cast<uint64_t>(Info(*dtype).block_bytes), &bytes)) {
    return Refuse(file, "tensor ", Quoted(name), ": ", *elements, " elements of ",
                  Info(*dtype).name, " overflow 64 bits");
  }
  if (bytes != entry.end - entry.begin) {
    return Refuse(file, "tensor ", Quoted(name), ": data_offsets span ", entry.end - entry.begin,
                  " bytes, its shape needs ", bytes);
  }
  return entry;
}

absl::Status CheckMetadata(const json& value, absl::string_view file) {
  if (!value.is_object()) return Refuse(file, "__metadata__ is not an object");
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) return Refuse(file, "__metadata__ ", Quoted(key), " is not a string");
  }
  return absl::OkStatus();
}

// The header's length, checked against the file and the format's limit.
absl::StatusOr<uint64_t> HeaderLength(absl::Span<const std::byte> file, absl::string_view path) {
  if (file.size() < 8) {
    return Refuse(path, "the file has ", file.size(), " bytes, the header length alone takes 8");
  }
  uint64_t length = 0;
  for (int i = 0; i < 8; ++i) length |= static_cast<uint64_t>(file[i]) << (8 * i);
  if (length > kMaxSafetensorsHeader) {
    return Refuse(path, "header of ", length, " bytes, the limit is ", kMaxSafetensorsHeader);
  }
  if (length > file.size() - 8) {
    return Refuse(path, "header of ", length, " bytes, the file has ", file.size() - 8,
                  " after the length");
  }
  if (length == 0 || file[8] != std::byte{'{'}) {
    return Refuse(path, "the header of ", length, " bytes does not start with \"{\"");
  }
  return length;
}

// The entries fill [0, size) exactly.
absl::Status CheckContiguous(const std::vector<Entry>& entries, uint64_t size,
                             absl::string_view file) {
  uint64_t next = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != next) {
      return Refuse(file, "tensor ", Quoted(entry.tensor.name), ": data_offsets begin at ",
                    entry.begin, entry.begin < next ? " (overlap)" : " (hole)",
                    ", the tensor before it ends at ", next);
    }
    next = entry.end;
  }
  if (next != size) {
    return Refuse(file, "the tensors end at byte ", next, " of ", size, " after the header");
  }
  return absl::OkStatus();
}

class SafetensorsCheckpoint : public Checkpoint {
 public:
  explicit SafetensorsCheckpoint(std::string path) : Checkpoint(std::move(path)) {}

  absl::Status ReadTensors();
  Format format() const override { return Format::kSafetensors; }
  const GgufMetadata& gguf() const override { return no_metadata_; }

  absl::StatusOr<std::string> ReadSideFile(absl::string_view basename) const override {
    absl::StatusOr<std::string> file = PathInside(path_, basename);
    if (absl::IsNotFound(file.status())) return std::string();
    if (!file.ok()) return file.status();
    return ReadSmallFile(*file, kMaxSideFile);
  }
  void Forget(const TensorInfo& tensor) const override {
    for (const MappedFile& file : files_) file.Forget(tensor.data);
  }

 private:
  // Adds the tensors of one file: those that `index` places in it, or all when it is null.
  absl::Status AddFile(const std::string& basename, const SafetensorsIndex* index);
  void AlignData(TensorInfo* tensor);

  std::vector<MappedFile> files_;
  std::vector<std::unique_ptr<uint32_t[]>> copies_;
  GgufMetadata no_metadata_;
};

absl::Status SafetensorsCheckpoint::ReadTensors() {
  absl::StatusOr<std::string> index_text = ReadSideFile("model.safetensors.index.json");
  if (!index_text.ok()) return index_text.status();
  if (index_text->empty()) {
    absl::Status status = AddFile("model.safetensors", nullptr);
    if (!absl::IsNotFound(status)) return status;
    return absl::NotFoundError(absl::StrCat(
        path_, ": neither model.safetensors nor model.safetensors.index.json is there"));
  }
  const std::string index_path = path_ + "/model.safetensors.index.json";
  absl::StatusOr<SafetensorsIndex> index = ParseSafetensorsIndex(*index_text, index_path);
  if (!index.ok()) return index.status();
  std::set<std::string> basenames;
  for (const auto& [name, basename] : *index) basenames.insert(basename);
  for (const std::string& basename : basenames) {
    absl::Status status = AddFile(basename, &*index);
    if (!status.ok()) return status;
  }
  for (const auto& [name, basename] : *index) {
    if (!tensors_.contains(name)) {
      return Refuse(index_path, "tensor ", Quoted(name), " is not in ", Quoted(basename));
    }
  }
  return absl::OkStatus();
}

absl::Status SafetensorsCheckpoint::AddFile(const std::string& basename,
                                            const SafetensorsIndex* index) {
  absl::StatusOr<std::string> path = PathInside(path_, basename);
  if (!path.ok()) return path.status();
  absl::StatusOr<MappedFile> file = MappedFile::Open(*path);
  if (!file.ok()) return file.status();
  absl::StatusOr<std::vector<TensorInfo>> tensors = ParseSafetensors(file->bytes(), *path);
  if (!tensors.ok()) return tensors.status();
  files_.push_back(*std::move(file));
  for (TensorInfo& tensor : *tensors) {
    if (index != nullptr) {
      const auto it = index->find(tensor.name);
      if (it == index->end()) {
        return Refuse(*path, "tensor ", Quoted(tensor.name), " is not in the index");
      }
      if (it->second != basename) {
        return Refuse(*path, "tensor ", Quoted(tensor.name), " is here, the index places it in ",
                      Quoted(it->second));
      }
    }
    AlignData(&tensor);
    const std::string name = tensor.name;
    tensors_.emplace(name, std::move(tensor));
  }
  return absl::OkStatus();
}

void SafetensorsCheckpoint::AlignData(TensorInfo* tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor->data.data());
  if (address % Info(tensor->dtype).block_bytes == 0) return;
  copies_.push_back(std::make_unique<uint32_t[]>((tensor->data.size() + 3) / 4));
  auto* copy = reinterpret_cast<std::byte*>(copies_.back().get());
  std::copy(tensor->data.begin(), tensor->data.end(), copy);
  tensor->data = {copy, tensor->data.size()};
}

}  // namespace

absl::StatusOr<std::vector<TensorInfo>> ParseSafetensors(absl::Span<const std::byte> file,
                                                         absl::string_view path) {
  absl::StatusOr<uint64_t> length = HeaderLength(file, path);
  if (!length.ok()) return length.status();
  const absl::string_view text(reinterpret_cast<const char*>(file.data()) + 8, *length);
  absl::StatusOr<json> header =
      ParseJsonObject(text, absl::StrCat(path, " (header)"), kHeaderLimits);
  if (!header.ok()) return header.status();

  std::vector<Entry> entries;
  for (const auto& [name, value] : header->items()) {
    if (name == "__metadata__") {
      absl::Status status = CheckMetadata(value, path);
      if (!status.ok()) return status;
      continue;
    }
    absl::StatusOr<Entry> entry = ReadEntry(name, value, path);
    if (!entry.ok()) return entry.status();
    entries.push_back(*std::move(entry));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  const absl::Span<const std::byte> data = file.subspan(8 + *length);
  absl::Status status = CheckContiguous(entries, data.size(), path);
  if (!status.ok()) return status;

  std::vector<TensorInfo> tensors;
  tensors.reserve(entries.size());
  for (Entry& entry : entries) {
    entry.tensor.data = data.subspan(entry.begin, entry.end - entry.begin);
    tensors.push_back(std::move(entry.tensor));
  }
  return tensors;
}

absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(absl::string_view text,
                                                       absl::string_view path) {
  absl::StatusOr<json> root = ParseJsonObject(text, path, kIndexLimits);
  if (!root.ok()) return root.status();
  const auto map = root->find("weight_map");
  if (map == root->end() || !map->is_object()) return Refuse(path, "no weight_map object");
  if (map->empty()) return Refuse(path, "weight_map is empty");
  SafetensorsIndex index;
  for (const auto& [name, file] : map->items()) {
    if (!file.is_string()) {
      return Refuse(path, "weight_map ", Quoted(name), ": not a file name");
    }
    const auto& basename = file.get_ref<const std::string&>();
    if (basename.find('/') != std::string::npos || basename.find('\0') != std::string::npos ||
        absl::StartsWith(basename, ".") || !absl::EndsWith(basename, ".safetensors")) {
      return Refuse(path, "weight_map ", Quoted(name), ": ", Quoted(basename),
                    " is not the plain name of a .safetensors file");
    }
    index.emplace(name, basename);
  }
  return index;
}

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenSafetensorsDirectory(const std::string& path) {
  auto checkpoint = std::make_unique<SafetensorsCheckpoint>(path);
  absl::StatusOr<std::string> config = checkpoint->ReadSideFile("config.json");
  if (!config.ok()) return config.status();
  if (config->empty()) {
    return absl::NotFoundError(absl::StrCat(path, "/config.json: not there, or empty"));
  }
  absl::Status status = checkpoint->ReadTensors();
  if (!status.ok()) return status;
  return checkpoint;
}

}  // namespace longspan
