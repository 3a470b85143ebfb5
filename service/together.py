"""`dve up`: a server and a worker side by side, which find one data folder and end together.

In: argv, or two command lines. Out: an exit code: the first one's that was not 0. Signals are passed on once
each, so that both drain; each child is on a leash, so that neither outlives this process, whatever ends it.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from service.flags import add_setting
from service.settings import load_settings, load_worker_settings
from service.supervisor import leash

_SERVE, _WORKER, _BOTH = ("host", "port", "model"), ("worker_devices", "worker_concurrency"), ("data_dir", "log_format")


def main(argv: Sequence[str]) -> int:
    """`dve up`. Raises ConfigError, once, before either is started."""
    parser = argparse.ArgumentParser(
        prog="dve up",
        description="Serve and train at once, in one data folder. The other settings are environment variables.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name in (*_SERVE, *_WORKER, *_BOTH):
        add_setting(parser, name)
    flags = vars(parser.parse_args(argv))
    load_settings({name: value for name, value in flags.items() if name not in _WORKER})
    load_worker_settings({name: value for name, value in flags.items() if name in (*_WORKER, *_BOTH)})

    def command(name: str, *settings: str) -> list[str]:
        given = [word for one in settings if one in flags for word in (f"--{one}", str(flags[one]))]
        return [sys.executable, "-m", "service.cli", name, *given]

    return run_together(command("serve", *_SERVE, *_BOTH), command("worker", *_WORKER, *_BOTH))


def run_together(*commands: Sequence[str]) -> int:
    """Returns when all have ended; one that ends takes the others along."""
    children = [_start(command) for command in commands]

    is_ending = False

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_ending
        is_ending = True
        _end(children)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        pid, status = os.waitpid(-1, 0)
        ended = next((child for child in children if child.pid == pid), None)
        if ended is not None:
            ended.returncode = codes[pid] = os.waitstatus_to_exitcode(status)
            # To both of them a second signal means: at once.
            if not is_ending:
                is_ending = True
                _end(children)
    return next((code for code in codes.values() if code), 0)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    leashed = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), "0", "--", *command]
    # A session of its own: the terminal's Ctrl-C reaches this process alone, and is passed on once.
    return subprocess.Popen(leashed, start_new_session=True)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    for child in children:
        # Not its own send_signal, which would reap one that has just ended behind the back of the wait above.
        if child.returncode is None:
            os.kill(child.pid, signal.SIGTERM)
