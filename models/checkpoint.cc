#include "models/checkpoint.h"

#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "models/gguf.h"
#include "models/safetensors.h"

namespace longspan {

absl::StatusOr<std::unique_ptr<Checkpoint>> Checkpoint::Open(const std::string& path) {
  std::error_code error;
  const auto status = std::filesystem::status(path, error);
  if (!std::filesystem::exists(status)) {
    return absl::NotFoundError(absl::StrCat(path, ": no such file or directory"));
  }
  if (std::filesystem::is_directory(status)) return OpenSafetensorsDirectory(path);
  if (absl::EndsWithIgnoreCase(path, ".gguf")) return OpenGgufFile(path);
  return absl::InvalidArgumentError(absl::StrCat(
      path, ": neither a directory with config.json and safetensors nor a .gguf file"));
}

const TensorInfo* Checkpoint::Find(absl::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace longspan
