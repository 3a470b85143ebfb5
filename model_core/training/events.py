"""What a run tells: one event per (stage, step, kind), written once however often a step is repeated after a resume.

In: events of the trainer; out: lines of `events.jsonl` and whoever listens. A line that a kill cut short is dropped
when the log is opened again. It takes no time of its own: durations stand in an event's data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_core.errors import ConfigError

EVENTS_NAME = "events.jsonl"
#: What somebody did, or what came of it: twice at one step is two events. A repeated step does not bring them back.
_EACH_TIME = ("resumed", "switched", "warning:freeze")


@dataclass(frozen=True, slots=True)
class Event:
    """global_step: optimizer steps done when it happened. kind: a word of `trainer.py`, or `warning:<what>`."""

    stage: int
    global_step: int
    kind: str
    message: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[int, int, str]:
        return (self.stage, self.global_step, self.kind)

    def to_json(self) -> str:
        """One line. Numbers that are not finite become null: JSON has no word for them."""
        content = {
            "stage": self.stage, "global_step": self.global_step, "kind": self.kind, "message": self.message,
            "data": _finite(self.data),
        }  # fmt: skip
        return json.dumps(content, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Event:
        content = json.loads(line)
        return cls(content["stage"], content["global_step"], content["kind"], content["message"], content["data"])


Listener = Callable[[Event], None]


class EventLog:
    """Hands each event to the listeners once, but for what somebody does again. With a folder, also to `events.jsonl`,
    whose keys count as told."""

    def __init__(self, folder: Path | None = None, listeners: tuple[Listener, ...] = (), *, write: bool = True) -> None:
        """write: False keeps the keys of the folder's log and leaves the file alone (the recipe's `loggers`)."""
        self._listeners = listeners
        self._told: set[tuple[int, int, str]] = set()
        self._path = None if folder is None or not write else Path(folder) / EVENTS_NAME
        if folder is not None:
            for event in read_events(Path(folder), repair=write):
                self._told.add(event.key)

    def tell(self, event: Event) -> bool:
        """False where this (stage, step, kind) was told before."""
        if event.key in self._told and event.kind not in _EACH_TIME:
            return False
        self._told.add(event.key)
        if self._path is not None:
            self._append(event.to_json() + "\n")
        for listener in self._listeners:
            listener(event)
        return True

    def _append(self, line: str) -> None:
        # One write a line: a kill leaves a whole line or a tail that the next start drops.
        with open(self._path, "ab", buffering=0) as file:
            file.write(line.encode())


def read_events(folder: Path, *, repair: bool = False) -> list[Event]:
    """Every event of a run. repair: cut off a half-written last line.

    Raises:
        ConfigError: a line before the last is not an event.
    """
    path = Path(folder) / EVENTS_NAME
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    if repair and len(whole) < len(raw):
        os.truncate(path, len(whole))
    found = []
    for number, line in enumerate(whole.decode(errors="replace").splitlines(), start=1):
        try:
            found.append(Event.from_json(line))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "the event log is damaged", value=f"{path}, line {number}", allowed="one JSON event a line",
                fix="Move the file away; the run itself does not need it", param=EVENTS_NAME,
            ) from error  # fmt: skip
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
