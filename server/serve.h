#pragma once

namespace longspan {

// `longspan serve`: runs until SIGTERM or SIGINT. Exit status 0 after an orderly end.
int RunServe(int argc, char** argv);

}  // namespace longspan
