#pragma once
// GGUF version 3, little endian: metadata, tensor descriptions and tensor bytes in one mapped file.
// ParseGguf is a pure function of hostile bytes (fuzzed): every count is compared with the bytes
// that remain before anything is allocated, every sum and product is checked, and sizes are
// compared before they are rounded up to the alignment.
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "models/checkpoint.h"

namespace longspan {

struct GgufFile {
  GgufMetadata metadata;
  std::vector<TensorInfo> tensors;  // in the order of the file; data views into it
};
absl::StatusOr<GgufFile> ParseGguf(absl::Span<const std::byte> file, absl::string_view path);

absl::StatusOr<std::unique_ptr<Checkpoint>> OpenGgufFile(const std::string& path);

}  // namespace longspan
