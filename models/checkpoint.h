#pragma once
// Named tensors in mapped files: a Hugging Face directory of *.safetensors, or one GGUF file. Files
// are hostile: every size is multiplied with overflow checks before it is used, nothing is read
// outside the file, and each refusal names the file, the tensor or key, and both numbers. Immutable
// after opening; lookups are safe from any thread. Views live as long as the Checkpoint.
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/dtype.h"

namespace longspan {

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;        // outermost first, as PyTorch has it (GGUF's order reversed)
  absl::Span<const std::byte> data;  // exactly shape × dtype bytes, inside the mapping
  std::string file;                  // for messages
};

// GGUF metadata value; arrays keep their element type.
using GgufValue = std::variant<uint64_t, int64_t, double, bool, std::string, std::vector<uint64_t>,
                               std::vector<int64_t>, std::vector<double>, std::vector<bool>,
                               std::vector<std::string>>;
using GgufMetadata = std::map<std::string, GgufValue, std::less<>>;

class Checkpoint {
 public:
  // `path` is a directory with config.json, or a .gguf file.
  static absl::StatusOr<std::unique_ptr<Checkpoint>> Open(const std::string& path);
  virtual ~Checkpoint() = default;

  enum class Format : uint8_t { kSafetensors, kGguf };
  virtual Format format() const = 0;
  const std::string& path() const { return path_; }

  const TensorInfo* Find(absl::string_view name) const;  // nullptr when absent
  const absl::flat_hash_map<std::string, TensorInfo>& tensors() const { return tensors_; }

  // Gives back the memory of a mapped tensor that will hardly be read again; reading it still
  // works.
  virtual void Forget(const TensorInfo&) const {}

  // Text of config.json / generation_config.json / tokenizer_config.json …; empty when absent or
  // GGUF. Size-bounded (16 MiB); only plain basenames inside the directory.
  virtual absl::StatusOr<std::string> ReadSideFile(absl::string_view basename) const = 0;
  virtual const GgufMetadata& gguf() const = 0;  // empty for safetensors

 protected:
  explicit Checkpoint(std::string path) : path_(std::move(path)) {}
  std::string path_;
  absl::flat_hash_map<std::string, TensorInfo> tensors_;
};

}  // namespace longspan
