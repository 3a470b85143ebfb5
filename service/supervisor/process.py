"""One trainer's process: started on a leash, told its deadline, asked to stop, killed, waited for.

In: a command and what it inherits. Out: an exit code, and events in a file. It refuses to know jobs and the store. To
be used in the main thread's event loop alone: the signal of a parent's death is that of the thread that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.supervisor import leash
from service.supervisor.event_file import open_for_append

DONE = 0
STORAGE_FULL = 74
CHECKPOINTED = 75
BAD_INPUT = 78
DEADLINE_PASSED = 79


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start. `{events_fd}` and `{control_fd}` in the command become the numbers of its descriptors.

    output_path: of its standard output, written anew; None: the log, as its errors.
    inherits: descriptors that live as long as it does, the device's lock among them.
    """

    command: Sequence[str]
    events_path: Path
    log_path: Path
    output_path: Path | None = None
    environment: Mapping[str, str] | None = None
    standard_input: int | None = None
    inherits: tuple[int, ...] = ()
    niceness: int = 0


class TrainerProcess:
    """A running trainer. Its process group ends with it: what a dead trainer leaves behind would hold the device."""

    def __init__(self, process: subprocess.Popen[bytes], control: int) -> None:
        self._process, self._control = process, control
        self._exited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watch()

    @classmethod
    def start(cls, launch: Launch) -> TrainerProcess:
        """Raises OSError where it can't be started or its files can't be opened (a full disk)."""
        with contextlib.ExitStack() as stack:
            events = open_for_append(launch.events_path)
            stack.callback(os.close, events)
            log = open_for_append(launch.log_path)
            stack.callback(os.close, log)
            output = log
            if launch.output_path is not None:
                output = stack.enter_context(open(launch.output_path, "wb")).fileno()
            read_end, write_end = os.pipe()
            stack.callback(os.close, read_end)
            on_failure = stack.enter_context(contextlib.ExitStack())
            on_failure.callback(os.close, write_end)
            # A trainer that does not read must not stop its supervisor.
            os.set_blocking(write_end, False)
            numbers = {"{events_fd}": str(events), "{control_fd}": str(read_end)}
            command = [numbers.get(word, word) for word in launch.command]
            leashed = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), str(launch.niceness), "--"]
            process = subprocess.Popen(
                [*leashed, *command],
                stdin=subprocess.DEVNULL if launch.standard_input is None else launch.standard_input,
                stdout=output,
                stderr=log,
                env=None if launch.environment is None else dict(launch.environment),
                pass_fds=(events, read_end, *launch.inherits),
                start_new_session=True,
            )
            on_failure.pop_all()
        return cls(process, write_end)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that killed it."""
        return self._process.returncode

    def send(self, command: Mapping[str, Any]) -> bool:
        """One line on its control pipe. False where it could not be taken: it is on its way out, or reads nothing."""
        if self._control < 0:
            return False
        try:
            os.write(self._control, json.dumps(command).encode() + b"\n")
        except (BlockingIOError, BrokenPipeError):
            return False
        return True

    def extend_deadline(self, seconds: float) -> bool:
        return self.send({"command": "deadline", "seconds": round(max(seconds, 0.0), 3)})

    def request_stop(self) -> None:
        """It saves and exits with 75."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """It and all that it started, at once; a stopped one too."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """The exit code, once it is dead and its process group was killed. May be awaited by several."""
        await asyncio.shield(self._exited)
        code = self.exit_code
        assert code is not None
        return code

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        if not hasattr(os, "pidfd_open"):  # not Linux
            waiting = threading.Thread(target=self._process.wait, daemon=True)
            waiting.start()
            loop.run_in_executor(None, waiting.join).add_done_callback(lambda _: self._reap())
            return
        descriptor = os.pidfd_open(self.pid)

        def on_exit() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            self._reap()

        loop.add_reader(descriptor, on_exit)

    def _reap(self) -> None:
        # Before it is waited for: until then its number can belong to nobody else.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._control)
        self._control = -1
        if not self._exited.done():
            self._exited.set_result(None)
