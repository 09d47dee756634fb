#include "tests/support/golden.h"

#include <cstring>
#include <fstream>
#include <sstream>

#include "kernels/check.h"
#include "tests/support/paths.h"

namespace longspan::testing {

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good()) << path;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

nlohmann::json ReadGolden(const std::string& relative) {
  auto json = nlohmann::json::parse(ReadFile(SourcePath("tests/golden/" + relative)), nullptr,
                                    /*allow_exceptions=*/false);
  CHECK(json.is_object()) << relative;
  return json;
}

Golden LoadGolden(const std::string& name) {
  const nlohmann::json json = ReadGolden(name + "/golden.json");
  Golden golden;
  golden.path = SourcePath("tests/golden/" + name);
  golden.tokens = json["tokens"].get<std::vector<int32_t>>();
  golden.vocab = json["vocab"].get<int>();
  const std::string raw = ReadFile(golden.path + "/logits.f32");
  golden.logits.resize(golden.tokens.size() * golden.vocab);
  CHECK_EQ(raw.size(), golden.logits.size() * sizeof(float)) << name;
  std::memcpy(golden.logits.data(), raw.data(), raw.size());
  return golden;
}

}  // namespace longspan::testing
