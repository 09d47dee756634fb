#pragma once
// A GPU and the CPU whose answers its ops are held to, opened once for a suite.
#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "tests/support/test_device.h"

namespace longspan::testing {

class GpuBesideCpu : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    gpu_ = OpenTestDevice(0, "cuda:0").release();
    cpu_ = Backend::Cpu({}).release();
  }
  static void TearDownTestSuite() {
    delete gpu_;
    delete cpu_;
  }
  static inline Backend *gpu_ = nullptr, *cpu_ = nullptr;
};

}  // namespace longspan::testing
