#pragma once
// What must hold for any tokenizer that was accepted and any bytes.
#include <algorithm>
#include <cstdint>
#include <string>

#include "models/tokenizer.h"
#include "models/utf8.h"

namespace longspan::testing {

inline bool TokenizerKeepsItsLaws(const Tokenizer& tokenizer, absl::string_view text) {
  for (const bool parse_special : {false, true}) {
    const auto ids = tokenizer.Encode(text, {.add_bos = true, .parse_special = parse_special});
    for (const int32_t id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) return false;
    }
    for (const bool skip_special : {false, true}) {
      TokenStream stream(tokenizer, skip_special);
      std::string joined;
      for (const int32_t id : ids) joined += stream.Append(id);
      joined += stream.Flush();
      if (joined != tokenizer.Decode(ids, skip_special)) return false;
      for (std::string_view rest = joined; !rest.empty();) {
        const size_t length = Utf8Length(rest);
        if (length == 0) return false;
        rest.remove_prefix(length);
      }
    }
  }
  return true;
}

}  // namespace longspan::testing
