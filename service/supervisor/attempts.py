"""A job's folder: an `attempt-K` for each try, and what a later try takes over from the earlier ones.

    <data folder>/jobs/<job id>/attempt-K/   job.json, told.jsonl, trainer.log, step-N/, final/

In: the folder. Out: where to write, where to resume, which events were never read. Nothing of an attempt is written by
another, but for what its death left half done. It refuses to know torch and what a checkpoint holds.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model_core.errors import CheckpointError
from model_core.manifest import Manifest, recover, verify_folder
from service.supervisor.devices import try_flock

#: Not the names that a trainer gives its own files: it refuses a folder where another run seems to live.
EVENTS = "told.jsonl"
READ_EVENTS = "told.read.jsonl"
RECIPE = "job.json"
LOG = "trainer.log"
LOCK = "lock"
#: A trainer's link to its best step, maybe an earlier attempt's; reasons for which a step is kept.
BEST = "best"
_LASTING = ("stage", "final", "best")
_ATTEMPT = re.compile(r"attempt-(\d+)")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class StepFolder:
    """A complete checkpoint. Of one step saved by two attempts the later one is newer. note: its manifest's `extra`."""

    step: int
    attempt: int
    path: Path
    note: Mapping[str, Any] = field(default_factory=dict, compare=False)


class JobFolder:
    """Everything that one job has on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def attempt(self, number: int) -> Path:
        return self.path / f"attempt-{number}"

    def attempts(self) -> list[tuple[int, Path]]:
        """Those that were begun, oldest first."""
        return _numbered(self.path, _ATTEMPT)

    def open_attempt(self, number: int) -> Path:
        """Its folder, made; what the dead ones before it left half written is removed. Raises OSError."""
        folder = self.attempt(number)
        folder.mkdir(parents=True, exist_ok=True)
        for _, earlier in self.attempts():
            recover(earlier)
        return folder

    def steps(self) -> list[StepFolder]:
        """Complete checkpoints of all attempts, newest first. Sizes are compared, not hashes: the trainer does that."""
        found = [
            StepFolder(step, attempt, path, manifest.extra)
            for attempt, folder in self.attempts()
            for step, path in _numbered(folder, _STEP)
            if (manifest := _manifest(path)) is not None
        ]
        return sorted(found, reverse=True)

    def surplus(self, attempt: int) -> list[Path]:
        """Of a job that this attempt has finished: what earlier ones saved to go on from, which it has gone on from.

        Ends of stages, what was best and the newest stay, as within one attempt.
        """
        best = self.attempt(attempt) / BEST
        kept = best.resolve() if best.exists() else None
        older = [step for step in self.steps()[1:] if step.attempt < attempt]
        steps = [step for step in older if step.note.get("reason") not in _LASTING]
        return [step.path for step in steps if step.path.resolve() != kept]

    def try_lock(self) -> int | None:
        """A descriptor that the trainer inherits; None while an earlier trainer of this job is not dead yet."""
        self.path.mkdir(parents=True, exist_ok=True)
        return try_flock(self.path / LOCK)

    def set_aside(self, step: Path) -> None:
        """A checkpoint that turned out to be damaged; nobody resumes from it again, and it can still be looked at."""
        with contextlib.suppress(OSError):
            step.rename(step.with_name(f"damaged-{step.name}"))

    def unread_events(self) -> Iterator[tuple[int, Path]]:
        """Event files of attempts whose supervisor did not live to read them to the end."""
        for number, folder in self.attempts():
            if (folder / EVENTS).is_file():
                yield number, folder / EVENTS

    def mark_read(self, number: int) -> None:
        folder = self.attempt(number)
        with contextlib.suppress(FileNotFoundError):
            (folder / EVENTS).rename(folder / READ_EVENTS)

    def event_files(self) -> list[Path]:
        """All that was said in all attempts, oldest attempt first."""
        names = (READ_EVENTS, EVENTS)
        return [folder / name for _, folder in self.attempts() for name in names if (folder / name).is_file()]


def _numbered(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    found = ((pattern.fullmatch(path.name), path) for path in folder.iterdir() if not path.is_symlink())
    return sorted((int(name[1]), path) for name, path in found if name and path.is_dir())


def _manifest(path: Path) -> Manifest | None:
    try:
        return verify_folder(path, deep=False)
    except (CheckpointError, OSError):
        return None
