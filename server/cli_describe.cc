// longspan describe MODEL: layers, caches and bytes of a checkpoint, before anything is allocated.
#include <iostream>

#include "kernels/backend.h"
#include "models/checkpoint.h"
#include "models/family.h"
#include "server/cli.h"
#include "server/config.h"
#include "server/device.h"
#include "server/flags.h"

namespace longspan {

int RunDescribe(int argc, char** argv) {
  int64_t context = 0;
  std::string shape, kv_dtype = "bf16";
  bool json = false;
  Flags flags(
      "describe", "[flags] [MODEL]",
      "Shows each layer of a checkpoint (a directory, a .gguf or a config.json), its cache and the "
      "bytes it takes. Without MODEL: the default model.");
  flags.String("shape", &shape, "NAME", "a public model's shape, as in bench, instead of MODEL");
  flags.Int64("context", &context, "count bytes for this many tokens; 0 is the model's context", 0);
  KvDtypeFlag(flags, &kv_dtype);
  flags.Bool("json", &json, "as one JSON object");
  flags.Epilogue("Example:\n  longspan describe models/downloads/gemma-3-270m.gguf --context 32k");
  std::vector<std::string> paths;
  if (auto exit = flags.Parse(argc, argv, &paths); exit.has_value()) return *exit;
  if (paths.size() + (shape.empty() ? 0 : 1) > 1) {
    std::cerr << "longspan describe: one MODEL, please\n";
    return 2;
  }
  if (paths.empty()) {
    auto path = shape.empty() ? DefaultModelPath() : ShapePath(shape);
    if (!path.ok()) {
      std::cerr << "longspan describe: " << path.status().message() << "\n";
      return 1;
    }
    paths.push_back(*path);
  }
  auto spec = ReadSpecAt(paths[0]);
  if (!spec.ok()) {
    std::cerr << "longspan describe: " << spec.status().message() << "\n";
    return 1;
  }
  const auto backend = Backend::Cpu({.threads = 1});
  const auto cache_dtype = KvDtypeOf(kv_dtype, "cpu");
  const absl::Status cached =
      cache_dtype.ok() ? spec->ValidateCache(*cache_dtype) : cache_dtype.status();
  if (!cached.ok()) {
    std::cerr << "longspan describe: " << cached.message() << "\n";
    return 1;
  }
  if (context == 0) context = spec->max_context;
  if (json) {
    std::cout << DescribeJson(*spec, backend->ops(), *cache_dtype, context) << "\n";
  } else {
    std::cout << Describe(*spec, backend->ops(), *cache_dtype, context);
  }
  return MissingFor(*spec, backend->ops()).empty() ? 0 : 1;
}

}  // namespace longspan
