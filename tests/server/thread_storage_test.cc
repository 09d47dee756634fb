#include "gtest/gtest.h"
#include "server/http_door.h"

namespace longspan {
namespace {

// What cuBLASLt 13 keeps in each thread of a process that links it: as glibc sees it, memory of
// every stack, those of libcivetweb among them, which are of 100 KiB.
thread_local volatile char storage[92 << 10];

TEST(HttpDoor, OpensBesideALibraryOfMuchThreadLocalStorage) {
  storage[0] = 1;
  const auto door = HttpDoor::Open("127.0.0.1:0", {}, {});
  ASSERT_TRUE(door.ok()) << door.status();
  EXPECT_GT((*door)->port(), 0);
}

}  // namespace
}  // namespace longspan
