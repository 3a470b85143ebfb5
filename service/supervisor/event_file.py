"""The trainer's events, read from the file that it appends them to.

In: a path. Out: events in their order, each whole. A file and not a pipe: what a trainer said just before its
supervisor was killed would be lost with the pipe, and the resumed trainer would not say it again. The file stays, and
whoever takes the job over reads it to its end first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 18
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TrainerEvent:
    """One line of a trainer. (stage, global_step, kind) is said once in a job, however often it is resumed."""

    stage: int
    global_step: int
    kind: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    created_at: float | None = None

    @property
    def key(self) -> tuple[int, int, str]:
        return self.stage, self.global_step, self.kind


class EventFile:
    """Reads what was appended since the last time. A line without its end is left for later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_damaged = 0
        self._offset = 0
        self._rest = b""

    def read(self, limit: int = 1000) -> list[TrainerEvent]:
        """At most about `limit` events; call again while it gives any."""
        found: list[TrainerEvent] = []
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                while len(found) < limit and (chunk := file.read(_CHUNK_BYTES)):
                    self._offset += len(chunk)
                    found += self._lines(chunk)
        except FileNotFoundError:
            return []
        return found

    def _lines(self, chunk: bytes) -> list[TrainerEvent]:
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            self._rest = b""
            self.num_damaged += 1
        events = [parse_event(line) for line in lines if line.strip()]
        self.num_damaged += events.count(None)
        return [event for event in events if event is not None]


def open_for_append(path: Path) -> int:
    """A descriptor for the trainer to inherit; it survives whoever opened it."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def parse_event(line: bytes) -> TrainerEvent | None:
    """None for a line that is no event: a trainer that was killed may leave half a line before the next one."""
    try:
        told = json.loads(line)
        stage, step, kind = told["stage"], told["global_step"], told["kind"]
        data = told.get("data") or {}
        if not isinstance(stage, int) or not isinstance(step, int) or not isinstance(kind, str):
            return None
        if not isinstance(data, dict):
            return None
        created = told.get("time")
        return TrainerEvent(
            stage, step, kind, str(told.get("message", "")), data, created if isinstance(created, int | float) else None
        )
    except (ValueError, KeyError, TypeError):
        return None
