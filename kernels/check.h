#pragma once
// CHECK for our own mistakes: prints file, line, condition and what is streamed, then aborts. What
// the world can cause is an absl::Status instead.
#include <cstdlib>
#include <iostream>
#include <sstream>

namespace longspan {

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition) {
    text_ << file << ":" << line << ": CHECK failed: " << condition << " ";
  }
  [[noreturn]] ~CheckFailure() {
    std::cerr << text_.str() << std::endl;
    std::abort();
  }
  std::ostream& stream() { return text_; }

 private:
  std::ostringstream text_;
};

}  // namespace longspan

#define LONGSPAN_CHECK(condition) \
  while (!(condition)) ::longspan::CheckFailure(__FILE__, __LINE__, #condition).stream()
#define LONGSPAN_CHECK_OP(op, a, b) LONGSPAN_CHECK((a)op(b)) << "(" << (a) << " vs " << (b) << ") "
#define CHECK(condition) LONGSPAN_CHECK(condition)
#define CHECK_EQ(a, b) LONGSPAN_CHECK_OP(==, a, b)
#define CHECK_NE(a, b) LONGSPAN_CHECK_OP(!=, a, b)
#define CHECK_LT(a, b) LONGSPAN_CHECK_OP(<, a, b)
#define CHECK_LE(a, b) LONGSPAN_CHECK_OP(<=, a, b)
#define CHECK_GT(a, b) LONGSPAN_CHECK_OP(>, a, b)
#define CHECK_GE(a, b) LONGSPAN_CHECK_OP(>=, a, b)
