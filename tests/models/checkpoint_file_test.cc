#include "models/checkpoint_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <vector>

#include "tests/support/paths.h"

namespace longspan {
namespace {

int64_t ResidentPages() {
  std::ifstream statm("/proc/self/statm");
  int64_t all = 0, resident = 0;
  statm >> all >> resident;
  return resident;
}

TEST(MappedFile, GivesBackWhatItForgetsAndReadsItAgain) {
  constexpr int64_t kPages = 8192, kPage = 4096;
  std::vector<char> bytes(kPages * kPage);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i / kPage + i);
  const std::string path = testing::TempDir() + "/forgotten";
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<int64_t>(bytes.size()));
  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto same = [&] {
    return std::equal(bytes.begin(), bytes.end(), file->bytes().begin(),
                      [](char a, std::byte b) { return static_cast<std::byte>(a) == b; });
  };
  ASSERT_TRUE(same());
  const int64_t before = ResidentPages();
  // Whole pages only: the first and the last one stay.
  file->Forget(file->bytes().subspan(1, bytes.size() - 2));
  const int64_t given_back = before - ResidentPages();
  EXPECT_GT(given_back, kPages * 9 / 10);
  EXPECT_TRUE(same());
}

TEST(MappedFile, LeavesMemoryOfOthersAlone) {
  const std::string path = testing::TempDir() + "/small";
  std::ofstream(path) << "text";
  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const std::vector<std::byte> other(1 << 20, std::byte{7});
  file->Forget(other);
  EXPECT_EQ(std::count(other.begin(), other.end(), std::byte{7}), 1 << 20);
}

}  // namespace
}  // namespace longspan
