#pragma once
// Ids that the reference implementations gave, see tests/golden/tokenizer/make_goldens.py.
#include <string>
#include <vector>

#include "models/tokenizer.h"

namespace longspan::testing {

struct TokenizerGolden {
  std::string text;
  std::vector<int32_t> special, plain;
  bool parts = false;  // sentencepiece and llama.cpp part here; the ids are sentencepiece's
};

// The cases of tests/golden/tokenizer/<name>.
std::vector<TokenizerGolden> ReadTokenizerGoldens(const std::string& name);

// Fails the running test for each case whose ids differ, or whose text does not come back.
void ExpectTokenizerGoldens(const Tokenizer& tokenizer, const std::vector<TokenizerGolden>& cases);

}  // namespace longspan::testing
