"""Between a trainer and whoever supervises it: events out by one open file, commands in by another.

Out: a JSON line an event. In: JSON lines,

    {"command": "deadline", "seconds": 30.0}   from now; pushed on again and again. Without one there is none
    {"command": "freeze", "freeze": {...}}     mode, flags or rules, before the next step
    {"command": "checkpoint"}                  save before the next step and go on

A deadline that passes, or the end of the commands, ends the process at once with 79 and saves nothing: whoever held
it may have given the job away. The thread that watches is this module's; the trainer knows none.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from model_core.training.events import Event

if TYPE_CHECKING:
    from model_core.training.trainer import DualVisionTrainer

LEASE_LOST = 79
_MAX_LINE = 1 << 20


class EventPipe:
    """Writes events to a descriptor; without one it does nothing."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._stage, self._global_step = 0, 0

    def __call__(self, event: Event) -> None:
        self._stage, self._global_step = event.stage, event.global_step
        self._write(event.to_json())

    def fail(self, code: str, message: str, *, retry: bool) -> None:
        """The last event of a run that ends in an error, at the step that it had reached."""
        data = {"code": code, "retry": retry}
        self._write(Event(self._stage, self._global_step, "error", message, data).to_json())

    def _write(self, line: str) -> None:
        if self._descriptor is None:
            return
        left = (line + "\n").encode()
        while left:
            left = left[os.write(self._descriptor, left) :]


class Control:
    """Reads commands in a thread of its own, so that a deadline holds inside a long step too."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._trainer: DualVisionTrainer | None = None
        self._early: list[Callable[[DualVisionTrainer], None]] = []
        self._lock = threading.Lock()
        self._deadline: float | None = None

    def start(self) -> None:
        """Before the model is loaded, which may outlast a deadline."""
        if self._descriptor is not None:
            threading.Thread(target=self._watch, name="dve-control", daemon=True).start()

    def attach(self, trainer: DualVisionTrainer) -> None:
        """Who obeys from now on, also to what has come already."""
        with self._lock:
            self._trainer = trainer
            for order in self._early:
                order(trainer)

    def _ask(self, order: Callable[[DualVisionTrainer], None]) -> None:
        with self._lock:
            if self._trainer is None:
                self._early.append(order)
            else:
                order(self._trainer)

    def _watch(self) -> None:
        buffer = b""
        while True:
            left = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            ready, _, _ = select.select([self._descriptor], [], [], left)
            if not ready:
                _leave("the deadline passed")
            received = os.read(self._descriptor, 65_536)
            if not received or len(buffer) > _MAX_LINE:
                _leave("the commands ended")
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                self._obey(line)

    def _obey(self, line: bytes) -> None:
        try:
            order: dict[str, Any] = json.loads(line)
            command = order["command"]
            if command == "deadline":
                self._deadline = time.monotonic() + float(order["seconds"])
            elif command == "freeze":
                freeze = dict(order["freeze"])
                self._ask(lambda trainer: trainer.request_freeze(freeze))
            elif command == "checkpoint":
                self._ask(lambda trainer: trainer.request_checkpoint())
            else:
                raise ValueError(command)
        except (ValueError, KeyError, TypeError) as error:
            print(f"dve train: a command can't be read: {line[:200]!r} ({error})", file=sys.stderr)


def _leave(why: str) -> None:
    sys.stderr.write(f"dve train: {why}; nothing more is saved\n")
    sys.stderr.flush()
    os._exit(LEASE_LOST)
