// longspan COMMAND [flags]: one binary for serving and for talking to a server.
#include <cstring>
#include <iostream>

#include "server/cli.h"
#include "server/serve.h"
#include "server/version.h"

namespace longspan {
namespace {

struct Command {
  const char* name;
  const char* help;
  int (*run)(int argc, char** argv);
};

constexpr Command kCommands[] = {
    {"serve", "serve a model over gRPC", RunServe},
    {"complete", "complete a prompt", RunComplete},
    {"chat", "talk to a model that has a chat form", RunChat},
    {"tokenize", "show a text's tokens", RunTokenize},
    {"describe", "show a checkpoint's layers, caches and bytes, without loading it", RunDescribe},
    {"models", "list what a server serves", RunModels},
    {"health", "exit 0 if a server is ready", RunHealth},
    {"needle", "run a needle-in-a-haystack grid and draw it", RunNeedleCommand},
    {"spans", "show how far each head looks", RunSpans},
    {"drain", "let a server finish its work", RunDrain},
    {"bench", "measure a model's speed, op by op", RunBench},
};

int Usage(std::ostream& out) {
  out << "Longspan " << kVersion << " (" << kGitCommit
      << "): an inference server for hybrid long-context language models.\n\n"
         "usage: longspan COMMAND [flags]      longspan COMMAND --help\n\n";
  for (const Command& command : kCommands) {
    out << "  " << command.name << std::string(12 - std::strlen(command.name), ' ') << command.help
        << "\n";
  }
  out << "\nEvery flag is also an environment variable: --max-running is LONGSPAN_MAX_RUNNING.\n";
  return &out == &std::cout ? 0 : 2;
}

int Main(int argc, char** argv) {
  if (argc < 2) return Usage(std::cerr);
  const std::string name = argv[1];
  if (name == "--help" || name == "-h" || name == "help") return Usage(std::cout);
  if (name == "--version") {
    std::cout << "longspan " << kVersion << " (" << kGitCommit << ")\n";
    return 0;
  }
  for (const Command& command : kCommands) {
    if (name == command.name) return command.run(argc - 1, argv + 1);
  }
  std::cerr << "longspan: there is no command '" << name << "'\n\n";
  return Usage(std::cerr);
}

}  // namespace
}  // namespace longspan

int main(int argc, char** argv) { return longspan::Main(argc, argv); }
