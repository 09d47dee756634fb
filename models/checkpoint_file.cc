#include "models/checkpoint_file.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"

namespace longspan {
namespace {

// What the SIGBUS handler may read: fixed memory and atomics only.
struct Mapping {
  std::atomic<uintptr_t> begin{0};  // 0: free
  std::atomic<uintptr_t> end{0};
  char path[256];
};
constexpr int kMaxMappings =
    512;  // further ones are mapped all the same, without a name in the message
Mapping mappings[kMaxMappings];
struct sigaction previous_action;

// In one write: several threads can meet the end of a file at once.
void WriteLine(std::initializer_list<const char*> parts) {
  iovec vector[4];
  int count = 0;
  for (const char* part : parts) {
    vector[count++] = {const_cast<char*>(part), strlen(part)};
  }
  if (writev(STDERR_FILENO, vector, count) < 0) return;  // nowhere left to complain
}

void OnBusError(int signal, siginfo_t* info, void* context) {
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const Mapping& mapping : mappings) {
    const uintptr_t begin = mapping.begin.load(std::memory_order_acquire);
    if (begin == 0 || address < begin || address >= mapping.end.load(std::memory_order_acquire)) {
      continue;
    }
    WriteLine({"longspan: ", mapping.path,
               ": the file became shorter, or unreadable, while it was in use\n"});
    _exit(kFileShrankExitCode);
  }
  if ((previous_action.sa_flags & SA_SIGINFO) != 0) {
    previous_action.sa_sigaction(signal, info, context);
  } else if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
  } else {
    sigaction(signal, &previous_action,
              nullptr);  // the faulting access repeats and dies as it would
  }
}

std::mutex& MappingsMutex() {
  static std::mutex mutex;
  return mutex;
}

int Register(const std::string& path, const void* data, size_t size) {
  std::lock_guard<std::mutex> lock(MappingsMutex());
  static const bool installed = [] {
    struct sigaction action = {};
    action.sa_sigaction = OnBusError;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGBUS, &action, &previous_action) == 0;
  }();
  for (int i = 0; installed && i < kMaxMappings; ++i) {
    Mapping& mapping = mappings[i];
    if (mapping.begin.load(std::memory_order_relaxed) != 0) continue;
    path.copy(mapping.path, sizeof(mapping.path) - 1);
    mapping.path[std::min(path.size(), sizeof(mapping.path) - 1)] = '\0';
    const auto begin = reinterpret_cast<uintptr_t>(data);
    mapping.end.store(begin + size, std::memory_order_release);
    mapping.begin.store(begin, std::memory_order_release);
    return i;
  }
  return -1;
}

void Unregister(int slot) {
  if (slot < 0) return;
  std::lock_guard<std::mutex> lock(MappingsMutex());
  mappings[slot].begin.store(0, std::memory_order_release);
}

absl::Status FileError(const std::string& path, const char* verb) {
  const std::string text = absl::StrCat(path, ": cannot ", verb, ": ", std::strerror(errno));
  if (errno == ENOENT || errno == ENOTDIR) return absl::NotFoundError(text);
  if (errno == EACCES || errno == EPERM) return absl::PermissionDeniedError(text);
  return absl::InvalidArgumentError(text);
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

// O_NONBLOCK: opening a pipe must not wait for its writer.
int OpenForReading(const std::string& path) {
  return open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
}

absl::StatusOr<size_t> RegularFileSize(const std::string& path, int fd) {
  struct stat stat = {};
  if (fstat(fd, &stat) != 0) return FileError(path, "stat");
  if (!S_ISREG(stat.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a regular file"));
  }
  return static_cast<size_t>(stat.st_size);
}

}  // namespace

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  const Descriptor fd(OpenForReading(path));
  if (fd.get() < 0) return FileError(path, "open");
  absl::StatusOr<size_t> size = RegularFileSize(path, fd.get());
  if (!size.ok()) return size.status();
  if (*size == 0) return absl::InvalidArgumentError(absl::StrCat(path, ": the file is empty"));
  void* data = mmap(nullptr, *size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) return FileError(path, "map");
  MappedFile file;
  file.path_ = path;
  file.data_ = data;
  file.size_ = *size;
  file.slot_ = Register(path, data, *size);
  return file;
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(slot_, other.slot_);
  return *this;
}

void MappedFile::Forget(absl::Span<const std::byte> part) const {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto mapped = reinterpret_cast<uintptr_t>(data_);
  const auto begin = reinterpret_cast<uintptr_t>(part.data());
  if (begin < mapped || begin + part.size() > mapped + size_) return;
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + part.size()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

MappedFile::~MappedFile() {
  if (data_ == nullptr) return;
  Unregister(slot_);
  munmap(data_, size_);
}

absl::StatusOr<std::string> ReadSmallFile(const std::string& path, size_t max_bytes) {
  const Descriptor fd(OpenForReading(path));
  if (fd.get() < 0) return FileError(path, "open");
  absl::StatusOr<size_t> size = RegularFileSize(path, fd.get());
  if (!size.ok()) return size.status();
  if (*size > max_bytes) {
    return absl::OutOfRangeError(
        absl::StrCat(path, ": the file has ", *size, " bytes, the limit is ", max_bytes));
  }
  std::string text(*size, '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = read(fd.get(), text.data() + done, text.size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return FileError(path, "read");
    if (n == 0) break;  // it shrank meanwhile
    done += static_cast<size_t>(n);
  }
  text.resize(done);
  return text;
}

absl::StatusOr<std::string> PathInside(const std::string& directory, absl::string_view basename) {
  if (basename.empty() || basename == "." || basename == ".." ||
      basename.find('/') != absl::string_view::npos ||
      basename.find('\0') != absl::string_view::npos) {
    return absl::InvalidArgumentError(absl::StrCat(
        directory, ": \"", basename, "\" is not a plain file name inside the directory"));
  }
  namespace fs = std::filesystem;
  const std::string path = absl::StrCat(directory, "/", basename);
  std::error_code error;
  const fs::path target = fs::canonical(path, error);
  if (error) return absl::NotFoundError(absl::StrCat(path, ": ", error.message()));
  const fs::path home = fs::canonical(directory, error);
  if (error) return absl::NotFoundError(absl::StrCat(directory, ": ", error.message()));
  if (target.parent_path() != home) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": links to ", target.string(), ", outside the model's directory ", home.string()));
  }
  return path;
}

}  // namespace longspan
