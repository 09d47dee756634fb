#pragma once
// Golden files below tests/golden.
#include <cstdint>
#include <string>
#include <vector>

#include "nlohmann/json.hpp"

namespace longspan::testing {

std::string ReadFile(const std::string& path);  // CHECKs that it can be read
nlohmann::json ReadGolden(const std::string& relative);

// A folder written by make_gemma3.py or make_swa_hybrid.py.
struct Golden {
  std::string path;
  std::vector<int32_t> tokens;
  int vocab = 0;
  std::vector<float> logits;  // [tokens, vocab]
};
Golden LoadGolden(const std::string& name);

}  // namespace longspan::testing
