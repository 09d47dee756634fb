#include "tests/support/tokenizer_golden.h"

#include <gtest/gtest.h>

#include "absl/strings/escaping.h"
#include "tests/support/golden.h"

namespace longspan::testing {

std::vector<TokenizerGolden> ReadTokenizerGoldens(const std::string& name) {
  const auto json = ReadGolden("tokenizer/" + name);
  std::vector<TokenizerGolden> cases;
  for (const auto& entry : json["cases"]) {
    TokenizerGolden golden;
    golden.text = entry.contains("hex") ? absl::HexStringToBytes(entry["hex"].get<std::string>())
                                        : entry["text"].get<std::string>();
    for (const auto& [mode, ids] :
         {std::pair("special", &golden.special), std::pair("plain", &golden.plain)}) {
      const std::string other = std::string(mode) + "_sentencepiece";
      golden.parts |= entry.contains(other);
      *ids = entry[entry.contains(other) ? other : mode].get<std::vector<int32_t>>();
    }
    cases.push_back(std::move(golden));
  }
  return cases;
}

void ExpectTokenizerGoldens(const Tokenizer& tokenizer, const std::vector<TokenizerGolden>& cases) {
  for (const TokenizerGolden& golden : cases) {
    SCOPED_TRACE(absl::CHexEscape(golden.text.substr(0, 100)));
    EXPECT_EQ(tokenizer.Encode(golden.text, {.add_bos = false, .parse_special = true}),
              golden.special);
    EXPECT_EQ(tokenizer.Encode(golden.text, {.add_bos = false, .parse_special = false}),
              golden.plain);
  }
}

}  // namespace longspan::testing
