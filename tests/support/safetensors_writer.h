#pragma once
// Writes small safetensors files and model directories for tests, well-formed or deliberately
// broken.
#include <cstdint>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/check.h"

namespace longspan::testing {

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
  CHECK(out.good()) << path;
}

// A file of this header, whatever it says, with its true length before it and `data` after it.
inline std::string SafetensorsBytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string out(reinterpret_cast<const char*>(&length), sizeof(length));
  return out + header + data;
}

class SafetensorsWriter {
 public:
  // `dtype` as the format spells it; `bytes` as they shall lie in the file.
  SafetensorsWriter& Add(const std::string& name, const std::string& dtype,
                         const std::vector<int64_t>& shape, const std::string& bytes) {
    entries_.push_back(absl::StrCat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":[",
                                    absl::StrJoin(shape, ","), "],\"data_offsets\":[", data_.size(),
                                    ",", data_.size() + bytes.size(), "]}"));
    data_ += bytes;
    return *this;
  }
  SafetensorsWriter& AddF32(const std::string& name, const std::vector<int64_t>& shape,
                            const std::vector<float>& values) {
    return Add(name, "F32", shape,
               std::string(reinterpret_cast<const char*>(values.data()), values.size() * 4));
  }
  // Header padded with spaces to a multiple of 8 bytes, as current writers do, unless told
  // otherwise.
  std::string Bytes(bool padded = true) const {
    std::string header = absl::StrCat("{", absl::StrJoin(entries_, ","), "}");
    while (padded && header.size() % 8 != 0) header += ' ';
    return SafetensorsBytes(header, data_);
  }

 private:
  std::vector<std::string> entries_;
  std::string data_;
};

}  // namespace longspan::testing
