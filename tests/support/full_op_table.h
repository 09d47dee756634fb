#pragma once
// An op table without a null entry, for tests of what a spec needs beyond ops. Nothing in it runs.
#include "kernels/ops.h"

namespace longspan::testing {

inline OpTable FullOpTable() {
  OpTable ops;
#define LONGSPAN_FILL(name) ops.name.function = [](BackendContext&, const name##Args&) {};
  LONGSPAN_OPS(LONGSPAN_FILL)
#undef LONGSPAN_FILL
  return ops;
}

}  // namespace longspan::testing
