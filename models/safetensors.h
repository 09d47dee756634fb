#pragma once
// The safetensors format: 8 bytes of little-endian header length, a JSON header, then the tensors'
// bytes. Both parsers are pure functions of hostile text (fuzzed).
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "models/checkpoint.h"

namespace longspan {

inline constexpr int64_t kMaxSafetensorsHeader = 100'000'000;  // bytes, the format's own limit
inline constexpr int kMaxTensorRank = 8;

// The tensors of one file, in the order of their bytes; data views into `file`. They fill the bytes
// after the header exactly, without overlap or hole. Dtypes F32, F16 and BF16; others are refused
// by name. Data may lie unaligned here (old writers did not pad the header).
absl::StatusOr<std::vector<TensorInfo>> ParseSafetensors(absl::Span<const std::byte> file,
                                                         absl::string_view path);

// model.safetensors.index.json: tensor name to the basename of the file that holds it.
using SafetensorsIndex = std::map<std::string, std::string>;
absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(absl::string_view text,
                                                       absl::string_view path);

// Opens a Hugging Face directory: config.json and either model.safetensors.index.json with its
// files or model.safetensors. Tensors whose bytes are not aligned to their element are copied to
// memory that is; all others stay mapped.
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenSafetensorsDirectory(const std::string& path);

}  // namespace longspan
