#pragma once
// Writes small GGUF files for tests, well-formed or deliberately broken: counts, offsets and sizes
// can be set to anything.
#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace longspan::testing {

class GgufWriter {
 public:
  // Type numbers of the format.
  enum : uint32_t {
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

  uint32_t version = 3;
  uint64_t alignment = 32;                          // of the data; not written as a key by itself
  std::optional<uint64_t> tensor_count, key_count;  // instead of the true ones

  template <class T>
  static std::string Raw(T value) {
    return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  static std::string Text(const std::string& text) { return Raw<uint64_t>(text.size()) + text; }

  GgufWriter& Key(const std::string& name, uint32_t type, const std::string& value) {
    keys_ += Text(name) + Raw(type) + value;
    ++keys_written_;
    return *this;
  }
  GgufWriter& U32(const std::string& name, uint32_t value) { return Key(name, kU32, Raw(value)); }
  GgufWriter& F32(const std::string& name, float value) { return Key(name, kF32, Raw(value)); }
  GgufWriter& String(const std::string& name, const std::string& value) {
    return Key(name, kString, Text(value));
  }
  GgufWriter& Strings(const std::string& name, const std::vector<std::string>& values) {
    std::string body = Raw<uint32_t>(kString) + Raw<uint64_t>(values.size());
    for (const std::string& value : values) body += Text(value);
    return Key(name, kArray, body);
  }
  template <class T>
  GgufWriter& Array(const std::string& name, uint32_t type, const std::vector<T>& values) {
    std::string body = Raw(type) + Raw<uint64_t>(values.size());
    for (const T value : values) body += Raw<T>(value);
    return Key(name, kArray, body);
  }

  // `shape` outermost first, as PyTorch has it. Data is placed behind what is there already.
  GgufWriter& Tensor(const std::string& name, const std::vector<uint64_t>& shape, uint32_t type,
                     const std::string& bytes) {
    data_.resize((data_.size() + alignment - 1) / alignment * alignment);
    TensorAt(name, shape, type, data_.size());
    data_ += bytes;
    return *this;
  }
  // Only the description, with any offset.
  GgufWriter& TensorAt(const std::string& name, std::vector<uint64_t> shape, uint32_t type,
                       uint64_t offset) {
    std::reverse(shape.begin(), shape.end());
    tensors_ += Text(name) + Raw<uint32_t>(shape.size());
    for (const uint64_t n : shape) tensors_ += Raw(n);
    tensors_ += Raw(type) + Raw(offset);
    ++tensors_written_;
    return *this;
  }
  GgufWriter& Data(const std::string& bytes) {
    data_ += bytes;
    return *this;
  }

  std::string Bytes() const {
    std::string out = "GGUF" + Raw(version) + Raw(tensor_count.value_or(tensors_written_)) +
                      Raw(key_count.value_or(keys_written_)) + keys_ + tensors_;
    if (!data_.empty()) out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data_;
  }

 private:
  std::string keys_, tensors_, data_;
  uint64_t keys_written_ = 0;
  uint64_t tensors_written_ = 0;
};

}  // namespace longspan::testing
