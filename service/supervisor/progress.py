"""Carries what a trainer tells into the store: events in batches, checkpoints, applied switches; metrics on the way.

In: event files. Out: rows, each once, however often the same event is read. It refuses to know processes.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from service.jobs.job import Lease, Level, NewCheckpoint, NewEvent
from service.jobs.store import Store
from service.supervisor.attempts import JobFolder, StepFolder
from service.supervisor.event_file import EventFile, TrainerEvent
from service.supervisor.lease_keeper import StoreThreads
from service.supervisor.telling import tell_event
from service.supervisor.verdict import BROKEN

_BATCH = 200
#: The trainer's names of a step's counts -> what the API and the metrics call them.
_COUNTS: Mapping[str, str] = {"num_tokens": "tokens", "num_samples": "samples", "num_label_tokens": "label_tokens"}
_LEVELS: Mapping[str, Level] = {"error": "error", "warning": "warn"}


#: Kind, stage and data of an event that is new: `TrainingMetrics.observe` of the attempt's device.
Observe = Callable[[str, int, Mapping[str, Any]], None]


class Progress:
    """One attempt's reporter. last_error: the trainer's latest complaint; summary: its last word."""

    def __init__(self, store: Store, call: StoreThreads, lease: Lease, folder: JobFolder, observe: Observe) -> None:
        self._store, self._call, self._lease, self._folder, self._observe = store, call, lease, folder, observe
        self._root = str(folder.path.parents[1]) + "/"
        self._sent_switches: deque[int] = deque()
        self._saved: dict[int, str] = {}
        self.last_error: TrainerEvent | None = None
        self.summary: Mapping[str, Any] = {}

    async def take_over(self) -> StepFolder | None:
        """Read what earlier attempts said and nobody read; enter checkpoints that were not told of; the newest one.

        The folders are looked at once, before the events: whatever led to a folder that is seen was said before it
        was complete. A second look could find one that a dying trainer finished meanwhile, and skip its events.
        """
        found = await asyncio.to_thread(self._folder.steps)
        for number, path in self._folder.unread_events():
            if number < self._lease.attempt:
                await self.read(EventFile(path), is_live=False)
                self._folder.mark_read(number)
        rows = await self._call.insist(self._store.jobs.checkpoints, self._lease.job_id, limit=10_000)
        self._saved = {row.step: row.path for row in rows[0]}
        untold = [self._found(one) for one in reversed(found) if not self._is_entered(one.step)]
        if untold:
            await self._append([event for event, _ in untold], [checkpoint for _, checkpoint in untold])
        await self._forget_deleted()
        return next(iter(found), None)

    async def read(self, file: EventFile, *, is_live: bool = True) -> int:
        """Everything that was appended since; how many events. They are in the store when this returns."""
        count = 0
        while events := file.read(_BATCH):
            count += len(events)
            await self._keep(events, is_live=is_live)
        return count

    async def drop_surplus(self) -> None:
        """Of a job that is done: earlier attempts' checkpoints that only served to go on from."""
        surplus = await asyncio.to_thread(self._folder.surplus, self._lease.attempt)
        if surplus:
            paths = [str(path) for path in surplus]
            for path in await self._call.insist(self._store.leases.drop_checkpoints, self._lease, paths):
                await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)

    def note_sent_switch(self, number: int) -> None:
        """The trainer answers switches in the order in which it got them."""
        self._sent_switches.append(number)

    async def _keep(self, events: Sequence[TrainerEvent], *, is_live: bool) -> None:
        saved = [new for event in events if event.kind == "checkpoint" and (new := _new_checkpoint(event)) is not None]
        await self._append([self._to_new(event) for event in events], saved)
        if saved:
            await self._forget_deleted()
        for event in events:
            if is_live:
                self._observe(event.kind, event.stage, _with_counts(event.data))
                await self._on_live(event)

    async def _append(self, events: Sequence[NewEvent], saved: Sequence[NewCheckpoint]) -> None:
        """One transaction: each waits for the disk, and a job that is taken over waits for all of them."""
        await self._call.insist(self._store.leases.append_events, self._lease, events, saved)
        self._saved.update((new.step, new.path) for new in saved)

    async def _on_live(self, event: TrainerEvent) -> None:
        tell_event(event.kind, event.stage, event.global_step, event.data)
        if event.kind == "error":
            self.last_error = event
        elif event.kind == "summary":
            self.summary = event.data
        elif event.kind == "switched" and self._sent_switches:
            number = self._sent_switches.popleft()
            await self._call.insist(self._store.leases.mark_switched, self._lease, number, event.global_step)

    def _found(self, found: StepFolder) -> tuple[NewEvent, NewCheckpoint]:
        """A complete folder whose event was cut off by a kill: its manifest says as much."""
        note = found.note
        stage, metrics = int(note.get("stage", 0)), note.get("metrics")
        reason = str(note.get("reason", "every"))[:32]
        known = dict(metrics) if isinstance(metrics, dict) else {}
        data = {"path": _without(self._root, str(found.path)), "step": found.step, "reason": reason, "metrics": known}
        event = NewEvent(stage, found.step, "checkpoint", f"Saved step {found.step}", data)
        return event, NewCheckpoint(found.step, stage, str(found.path), reason, known)

    def _is_entered(self, step: int) -> bool:
        """A row whose folder retention has deleted since counts for nothing."""
        return step in self._saved and Path(self._saved[step]).is_dir()

    async def _forget_deleted(self) -> None:
        gone = [step for step, path in self._saved.items() if not Path(path).is_dir()]
        if gone:
            await self._call.insist(self._store.leases.forget_checkpoints, self._lease, gone)
            for step in gone:
                del self._saved[step]

    def _to_new(self, event: TrainerEvent) -> NewEvent:
        level = _LEVELS.get(event.kind.partition(":")[0], "info")
        is_broken = event.kind == "error" and event.data.get("code") == "internal_error"
        message = BROKEN if is_broken else _without(self._root, event.message)
        data = _without(self._root, _with_counts(event.data) if event.kind == "step" else event.data)
        return NewEvent(event.stage, event.global_step, event.kind[:128], message, data, level)


def _new_checkpoint(event: TrainerEvent) -> NewCheckpoint | None:
    """None where retention has deleted the folder since: an old event, read late."""
    path, metrics = Path(str(event.data.get("path", ""))), event.data.get("metrics")
    if not path.is_dir():
        return None
    step, reason = int(event.data.get("step", event.global_step)), str(event.data.get("reason", "every"))[:32]
    return NewCheckpoint(step, event.stage, str(path), reason, metrics if isinstance(metrics, dict) else {})


def _with_counts(data: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**{short: data[long] for long, short in _COUNTS.items() if long in data}, **data}


def _without(root: str, value: Any) -> Any:
    """The server's own folder cut out of every text: events are shown to clients."""
    if isinstance(value, str):
        return value.replace(root, "")
    if isinstance(value, Mapping):
        return {key: _without(root, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without(root, one) for one in value]
    return value
