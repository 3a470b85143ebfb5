"""Puts a command on a leash and becomes it: it dies with the thread that started it, and runs at a low priority.

Run as a script, `python leash.py PARENT_PID NICENESS -- COMMAND...`, not imported: what Python offers for this between
fork and exec (`preexec_fn`) may deadlock in a process with threads. The signal survives exec. Linux alone has it;
elsewhere the trainer's own deadline does the work, later.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
#: The supervisor is gone already; nobody will read this code.
ORPHANED = 79


def main(argv: list[str]) -> int:
    """Returns only where the parent is no longer the one that started this."""
    parent, niceness = int(argv[0]), int(argv[1])
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Asked after it, or a parent that died in between would never be noticed.
    if os.getppid() != parent:
        return ORPHANED
    if niceness:
        yield_to_others(niceness)
    command = argv[3:]
    os.execv(command[0], command)
    return ORPHANED


def yield_to_others(niceness: int) -> None:
    """Where Linux groups processes by session (sched_autogroup), niceness counts within a group alone: a trainer in a
    session of its own had as much of the machine as the server. The group has a niceness of its own."""
    os.nice(niceness)
    if os.getsid(0) == os.getpid():
        with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as group:
            group.write(str(niceness))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
