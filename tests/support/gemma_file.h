#pragma once
// Gemma 3 270M's GGUF for slow tests.
#include <string>

namespace longspan::testing {

// $LONGSPAN_GEMMA_GGUF, or the file that models/get keeps, fetched if need be.
std::string GemmaFile();

}  // namespace longspan::testing
