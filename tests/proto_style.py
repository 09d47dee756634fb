"""Holds .proto files to the rules of buf's STANDARD set that matter on the wire and in generated code.

usage: proto_style.py FILE...      (paths that contain the package's folders, as proto/longspan/v1/x.proto)
"""

import re
import sys

SNAKE = re.compile(r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")
PASCAL = re.compile(r"^[A-Z][A-Za-z0-9]*$")


def violations(path, text):
    code = re.sub(r"//[^\n]*", "", text)
    package = re.search(r"^package ([\w.]+);", code, re.M)
    if package is None:
        yield "no package"
    else:
        if not re.search(r"\.v\d+$", package[1]):
            yield f"package {package[1]} has no version suffix"
        if "/" + package[1].replace(".", "/") + "/" not in path:
            yield f"package {package[1]} does not match the folder"
    if not re.search(r'^syntax = "proto3";', code, re.M):
        yield "not proto3"
    used = set()
    for service, body in re.findall(r"service (\w+) \{(.*?)\n\}", code, re.S):
        if not service.endswith("Service"):
            yield f"service {service} lacks the suffix Service"
        for rpc, request, response in re.findall(
            r"rpc (\w+)\((?:stream )?([\w.]+)\) returns \((?:stream )?([\w.]+)\)", body
        ):
            if request != rpc + "Request" or response != rpc + "Response":
                yield f"rpc {rpc} uses {request} and {response}"
            if {request, response} & used:
                yield f"rpc {rpc} shares a message with another"
            used |= {request, response}
    for name, body in re.findall(r"enum (\w+) \{(.*?)\}", code, re.S):
        prefix = re.sub(r"(?<!^)([A-Z])", r"_\1", name).upper() + "_"
        values = re.findall(r"(\w+) = (\d+);", body)
        for value, _ in values:
            if not value.startswith(prefix):
                yield f"enum value {value} lacks the prefix {prefix}"
        if not values or values[0] != (prefix + "UNSPECIFIED", "0"):
            yield f"enum {name} does not begin with {prefix}UNSPECIFIED = 0"
    for name in re.findall(r"message (\w+) \{", code):
        if not PASCAL.match(name):
            yield f"message {name} is not PascalCase"
    for field in re.findall(r"^\s+(?:optional |repeated )?(?:map<[^>]+>|[\w.]+) (\w+) = \d+", code, re.M):
        if not SNAKE.match(field):
            yield f"field {field} is not snake_case"


def main():
    found = 0
    for path in sys.argv[1:]:
        with open(path) as file:
            for violation in violations(path, file.read()):
                print(f"{path}: {violation}", file=sys.stderr)
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
