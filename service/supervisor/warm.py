"""A program that has its imports behind it: waits for one command line, then is that program.

Run on the leash as `python -m service.supervisor.warm MODULE...`, never imported. In: one JSON line on standard input,
{"module", "arguments", "output", "log"}. Out: that module's `main(arguments)` with its output in a file, and its exit
code. Reading a small file takes milliseconds, importing what reads it takes seconds, and a job waits for both.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

_WRONG_CALL = 2


def main(modules: list[str]) -> int:
    """Returns 0 where nobody had a command after all."""
    programs = {name: importlib.import_module(name) for name in modules}
    line = sys.stdin.readline()
    if not line:
        return 0
    wanted = json.loads(line)
    for path, descriptor, flags in ((wanted["output"], 1, os.O_TRUNC), (wanted["log"], 2, os.O_APPEND)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    return int(programs[wanted["module"]].main(wanted["arguments"]) or 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(_WRONG_CALL)
    sys.exit(main(sys.argv[1:]))
