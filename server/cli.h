#pragma once
// The commands of the `longspan` binary other than `serve`. argv[0] is the command's own name; each
// returns the process's exit status: 0 done, 1 failed, 2 used wrongly, 3 below --min-score, 130
// interrupted. Data goes to stdout, progress and errors to stderr.

namespace longspan {

int RunComplete(int argc, char** argv);
int RunChat(int argc, char** argv);
int RunTokenize(int argc, char** argv);
int RunDescribe(int argc, char** argv);
int RunModels(int argc, char** argv);
int RunHealth(int argc, char** argv);
int RunNeedleCommand(int argc, char** argv);
int RunSpans(int argc, char** argv);
int RunDrain(int argc, char** argv);
int RunBench(int argc, char** argv);

}  // namespace longspan
