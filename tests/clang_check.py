"""Checks the sources named on standard input with clang++ -fsyntax-only, by compile_commands.json's flags.

usage: clang_check.py COMPILE_COMMANDS < file names (one a line)
"""

import concurrent.futures
import json
import os
import shlex
import subprocess
import sys


def check(entry):
    words = shlex.split(entry["command"])
    while not words[0].endswith("++"):  # compiler launchers
        words.pop(0)
    arguments = [w for w in words[1:] if w != "-c"]
    if "-o" in arguments:
        at = arguments.index("-o")
        del arguments[at : at + 2]
    command = ["clang++", "-fsyntax-only", "-Wthread-safety", *arguments]
    done = subprocess.run(command, cwd=entry["directory"], capture_output=True, text=True)
    return entry["file"], done.returncode, done.stderr


def main():
    wanted = {os.path.abspath(line.strip()) for line in sys.stdin}
    with open(sys.argv[1]) as file:
        entries = {e["file"]: e for e in json.load(file) if e["file"] in wanted}
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, code, errors in pool.map(check, entries.values()):
            if code != 0:
                failed += 1
                print(f"{name}\n{errors}", file=sys.stderr)
    print(f"clang: {len(entries)} files checked, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
