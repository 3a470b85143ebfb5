"""One process that has imported what reads training files, kept ready: importing takes longer than reading most files.

In: a command line of that program. Out: the process that now is it, or None where none is ready or it is another
program. It is used once; the next one is made ready when nothing is being read.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from service.settings import child_environment
from service.supervisor.process import Launch, TrainerProcess

_NOWHERE = Path(os.devnull)


class WarmReader:
    """modules: the program's own first, then what it imports late. Of the main thread's loop, as TrainerProcess."""

    def __init__(self, modules: Sequence[str], niceness: int) -> None:
        self._modules, self._niceness = tuple(modules), niceness
        self._spare: tuple[TrainerProcess, int] | None = None
        self._has_failed = False

    def prepare(self) -> None:
        """Start one, unless one is there. One that ended by itself can't be had here, and is not tried again."""
        if self._spare is not None and self._spare[0].exit_code is not None:
            self._has_failed = True
            self._drop()
        if self._spare is not None or self._has_failed:
            return
        read_end, write_end = os.pipe()
        command = (sys.executable, "-m", "service.supervisor.warm", *self._modules)
        environment = child_environment(CUDA_VISIBLE_DEVICES="")
        try:
            process = TrainerProcess.start(
                Launch(
                    command, _NOWHERE, _NOWHERE, environment=environment, standard_input=read_end,
                    niceness=self._niceness,
                )
            )  # fmt: skip
        except OSError:
            os.close(write_end)
            return
        finally:
            os.close(read_end)
        self._spare = (process, write_end)

    def take(self, command: Sequence[str], output: Path, log: Path) -> TrainerProcess | None:
        """The ready process, told to be `python -m MODULE ARGUMENTS...`."""
        if self._spare is None or tuple(command[:3]) != (sys.executable, "-m", self._modules[0]):
            return None
        process, write_end = self._spare
        wanted = {"module": command[2], "arguments": command[3:], "output": str(output), "log": str(log)}
        try:
            os.write(write_end, json.dumps(wanted).encode() + b"\n")
        except OSError:
            return None
        finally:
            self._drop()
        return None if process.exit_code is not None else process

    async def close(self) -> None:
        """Ends one that still waits."""
        if self._spare is not None:
            process = self._spare[0]
            self._drop()
            process.kill()
            await process.wait()

    def _drop(self) -> None:
        if self._spare is not None:
            with contextlib.suppress(OSError):
                os.close(self._spare[1])
            self._spare = None
