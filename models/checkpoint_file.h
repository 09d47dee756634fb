#pragma once
// One regular file mapped read-only. The mapping is private and lives as long as the object; views
// into it are safe from any thread. If the file is cut short behind our back, reading its lost
// pages would be a bare SIGBUS: the first Open() installs a handler that names the file and leaves
// with status 74 (EX_IOERR); bus errors elsewhere go to whoever handled them before.
#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace longspan {

inline constexpr int kFileShrankExitCode = 74;

class MappedFile {
 public:
  // Refuses what is not a regular file (no waiting on pipes) and empty files.
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const std::string& path() const { return path_; }
  absl::Span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(data_), size_};
  }
  // Gives back the memory of the whole pages of `part`; read again, they come from the file again.
  // What is not of this mapping is left alone.
  void Forget(absl::Span<const std::byte> part) const;

 private:
  MappedFile() = default;
  std::string path_;
  void* data_ = nullptr;
  size_t size_ = 0;
  int slot_ = -1;  // in the list that the SIGBUS handler reads
};

// The whole of a small file. OutOfRange with both sizes when it is larger than max_bytes, NotFound
// when it is not there.
absl::StatusOr<std::string> ReadSmallFile(const std::string& path, size_t max_bytes);

// directory/basename, refused when basename is not a plain name (empty, ".", "..", holds "/" or
// NUL) or is a link that leads out of the directory. NotFound when there is no such file.
absl::StatusOr<std::string> PathInside(const std::string& directory, absl::string_view basename);

}  // namespace longspan
