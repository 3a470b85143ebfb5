"""One claim, from its first file to its last word in the store: training, or the reading of files before it.

In: a claim, the slot's lock, what to start. Out: exactly one settling write (or none, where the lease is lost), and no
process left. The trainer runs as long as the lease is believed in; whoever loses it kills the child first and then
lets go of the slot.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from model_core.errors import CheckpointError, CheckpointIncompleteError, DualVisionError
from model_core.manifest import verify_folder
from service.jobs.job import Claim, Job, Lease, LeaseLostError
from service.jobs.store import Store
from service.logs import log_fields
from service.metrics import TrainingMetrics
from service.supervisor.attempts import EVENTS, LOG, JobFolder
from service.supervisor.devices import Device, DeviceLock
from service.supervisor.event_file import EventFile
from service.supervisor.lease_keeper import LeaseKeeper, StoreThreads, work_under
from service.supervisor.process import Launch, TrainerProcess
from service.supervisor.progress import Progress
from service.supervisor.telling import begin_attempt, tell_verdict, tell_whole_life
from service.supervisor.verdict import Verdict, backoff_seconds, judge, of_os_error, of_refusal
from service.tracing.span import NO_SPAN, NoTracer, Span, Tracer

_LOCK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class RunLimits:
    """grace_seconds: from the request to save until the kill. watch_seconds: between two looks at what people want.
    tail_seconds: between two looks at what the trainer told; each is a transaction, and an event may be so late.
    recheck_seconds: until a job that lacks memory is tried again.
    """

    grace_seconds: float = 120.0
    watch_seconds: float = 1.0
    tail_seconds: float = 0.5
    backoff_base_seconds: float = 2.0
    backoff_limit_seconds: float = 300.0
    recheck_seconds: float = 30.0
    niceness: int = 0


@dataclass(frozen=True, slots=True)
class Start:
    """What a room outside decides about one attempt: the command with its placeholders, and its environment."""

    command: tuple[str, ...]
    environment: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """fine_tuned_model: the id it is served under; None for a job that publishes nothing."""

    fine_tuned_model: str | None
    result_files: tuple[str, ...] = ()


class Workshop(Protocol):
    """What a job's programs are and what becomes of its result. Each raises DualVisionError for what can't be done."""

    def start(self, job: Job, attempt_folder: Path, resume: Path | None, lock: DeviceLock) -> Start:
        """Called in a thread: it may ask the store and write the recipe."""

    async def fits(self, job: Job, attempt_folder: Path, lock: DeviceLock) -> str | None:
        """None, or what is missing on this device now."""

    async def publish(self, job: Job, lease: Lease, folder: JobFolder, attempt_folder: Path) -> Published: ...


@dataclass(slots=True)
class RunContext:
    """What all runs of a worker share."""

    store: Store
    call: StoreThreads
    workshop: Workshop
    metrics: TrainingMetrics
    jobs_folder: Path
    max_attempts: int = 3
    limits: RunLimits = field(default_factory=RunLimits)
    tracer: Tracer = field(default_factory=NoTracer)


class JobRun:
    """One attempt at one job. `run` returns when nothing of it is left."""

    def __init__(self, context: RunContext, claim: Claim, claimed_at: float, lock: DeviceLock) -> None:
        self._context, self._store, self._call = context, context.store, context.call
        self._lock = lock
        self.keeper = LeaseKeeper(context.store.leases, context.call, claim, claimed_at)
        self._lease = claim.lease
        self._folder = JobFolder(context.jobs_folder / claim.job.id)
        observe = partial(context.metrics.observe, lock.device.name)
        self._progress = Progress(context.store, context.call, claim.lease, self._folder, observe)
        self._process: TrainerProcess | None = None
        self._stop_asked = asyncio.Event()
        self._is_draining = False
        self._job_lock: int | None = None
        self._resume: Path | None = None
        self._span: Span = NO_SPAN

    @property
    def job_id(self) -> str:
        return self._lease.job_id

    @property
    def device(self) -> Device:
        return self._lock.device

    def drain(self) -> None:
        """Save, stop, and give the job back for another worker."""
        self._is_draining = True
        self._stop_asked.set()

    def kill(self) -> None:
        """Stop at once; the job goes back to where it was saved last."""
        self.drain()
        if self._process is not None:
            self._process.kill()

    async def run(self) -> None:
        """Ends with the lease lost or the job settled; what the store or the trainer did is told, not raised."""
        self._span = begin_attempt(self._context.tracer, "attempt", self.keeper.job)
        try:
            await work_under(self.keeper, self._work(), self._end_child)
        finally:
            self._span.end()
            self._context.metrics.clear(self.device.name)
            # The child first, then the slot: the next owner may begin as soon as the lock is free.
            if self._job_lock is not None:
                os.close(self._job_lock)
            self._lock.close()

    async def _end_child(self) -> None:
        if self._process is not None:
            self._process.kill()
            await self._process.wait()

    async def _work(self) -> None:
        try:
            verdict = await self._attempt()
            if verdict.end == "succeeded":
                await self._publish()
                return
        except LeaseLostError:
            raise
        except OSError as error:
            verdict = of_os_error(error)
        except DualVisionError as error:
            verdict = of_refusal(error)
        await self._settle(verdict)

    async def _attempt(self) -> Verdict:
        await self._wait_for_earlier_trainer()
        attempt_folder = await asyncio.to_thread(self._folder.open_attempt, self._lease.attempt)
        newest = await self._progress.take_over()
        self._resume = await self._first_checkpoint() if newest is None else newest.path
        workshop, job = self._context.workshop, self.keeper.job
        if missing := await workshop.fits(job, attempt_folder, self._lock):
            return Verdict("postponed", "", missing)
        if self._stop_asked.is_set():
            return Verdict("stopped")
        start = await self._call.insist(workshop.start, job, attempt_folder, self._resume, self._lock)
        exit_code = await self._train(start, attempt_folder)
        complaint = self._progress.last_error
        said = "" if complaint is None else complaint.message.replace(f"{self._context.jobs_folder.parent}/", "")
        verdict = judge(exit_code, None if complaint is None else complaint.data, said)
        if verdict.code == "checkpoint_corrupt" and await self._set_aside_damaged():
            return Verdict("retry", verdict.code, verdict.message)
        return verdict

    async def _set_aside_damaged(self) -> bool:
        """Whether what was resumed from is this job's own and damaged; then the one before it gets a turn."""
        step = self._resume
        if step is None or self._folder.path not in step.parents:
            return False
        try:
            await asyncio.to_thread(verify_folder, step, deep=True)
        except CheckpointError:
            self._folder.set_aside(step)
            return True
        return False

    async def _wait_for_earlier_trainer(self) -> None:
        """Its deadline has passed, but on a busy machine it may take a moment to die; one that is stopped never does,
        and will find its deadline passed when it wakes: it is not waited for longer than a lease."""
        give_up_at = time.monotonic() + self._lease.seconds
        while (lock := self._folder.try_lock()) is None and time.monotonic() < give_up_at:
            await asyncio.sleep(_LOCK_SECONDS)
        self._job_lock = lock

    async def _first_checkpoint(self) -> Path | None:
        """Of another job, where this one was to go on from it."""
        wanted = self.keeper.job.resume_from
        if wanted is None:
            return None
        found = await self._call.insist(self._store.jobs.checkpoint, wanted)
        if found is None or not Path(found.path).is_dir():
            raise CheckpointIncompleteError(
                "the checkpoint to go on from is not there any more", value=wanted, param="resume_from",
                allowed="a checkpoint that is listed under its job", fix="Name another one",
            )  # fmt: skip
        return Path(found.path)

    async def _train(self, start: Start, attempt_folder: Path) -> int:
        events = EventFile(attempt_folder / EVENTS)
        process = TrainerProcess.start(
            Launch(
                start.command, events.path, attempt_folder / LOG, environment=start.environment,
                inherits=self._inherited(), niceness=self._context.limits.niceness,
            )
        )  # fmt: skip
        self._process, begin = process, time.monotonic()
        process.extend_deadline(self.keeper.remaining_seconds)
        self.keeper.on_renewed = lambda _: process.extend_deadline(self.keeper.remaining_seconds)
        resumed = None if self._resume is None else str(self._resume)
        log_fields(logging.INFO, "trainer started", pid=process.pid, attempt=self._lease.attempt, resume=resumed)
        helpers = [asyncio.create_task(self._watch(process)), asyncio.create_task(self._stop_when_asked(process))]
        try:
            await self._tail(process, events)
        finally:
            for helper in helpers:
                helper.cancel()
            ends = await asyncio.gather(*helpers, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end
        exit_code = await process.wait()
        self._span.child("train", begin, time.monotonic(), dve__exit_code=exit_code)
        self._folder.mark_read(self._lease.attempt)
        log_fields(logging.INFO, "trainer ended", exit_code=exit_code, num_damaged_lines=events.num_damaged)
        return exit_code

    def _inherited(self) -> tuple[int, ...]:
        return (self._lock.descriptor,) if self._job_lock is None else (self._lock.descriptor, self._job_lock)

    async def _tail(self, process: TrainerProcess, events: EventFile) -> None:
        while process.exit_code is None:
            await self._progress.read(events)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), self._context.limits.tail_seconds)
        await self._progress.read(events)

    async def _watch(self, process: TrainerProcess) -> None:
        """Pause and cancel, and live switches of the mode, as the store shows them."""
        sent, from_step = 0, self._resume_step()
        while True:
            action, num_switches = await self._call.insist(self._store.leases.wishes, self._lease)
            if action is not None:
                self._stop_asked.set()
            if num_switches > sent:
                for switch in await self._call.insist(self._store.jobs.switches, self.job_id, from_step=from_step):
                    if switch.number > sent:
                        self._progress.note_sent_switch(switch.number)
                        process.send({"command": "freeze", "freeze": switch.freeze})
                sent = num_switches
            await asyncio.sleep(self._context.limits.watch_seconds)

    def _resume_step(self) -> int:
        step = "0" if self._resume is None else self._resume.name.removeprefix("step-")
        return int(step) if step.isdigit() else 0

    async def _stop_when_asked(self, process: TrainerProcess) -> None:
        await self._stop_asked.wait()
        log_fields(logging.INFO, "asking the trainer to save and stop", draining=self._is_draining)
        process.request_stop()
        await asyncio.sleep(self._context.limits.grace_seconds)
        log_fields(logging.WARNING, "the trainer did not stop in time and is killed")
        process.kill()

    async def _publish(self) -> None:
        attempt_folder = self._folder.attempt(self._lease.attempt)
        begin = time.monotonic()
        done = await self._context.workshop.publish(self.keeper.job, self._lease, self._folder, attempt_folder)
        await self._progress.drop_surplus()
        self._span.child("publish", begin, time.monotonic())
        tokens = self._progress.summary.get("trained_tokens")
        job = await self._call.insist(
            self._store.leases.succeed, self._lease, fine_tuned_model=done.fine_tuned_model,
            result_files=done.result_files, trained_tokens=tokens if isinstance(tokens, int) else None,
        )  # fmt: skip
        self._context.metrics.attempts.labels("succeeded").inc()
        tell_verdict(self._span, Verdict("succeeded"))
        tell_whole_life(self._context.tracer, job, job.status)
        log_fields(logging.INFO, "job succeeded", model=done.fine_tuned_model)

    async def _settle(self, verdict: Verdict) -> None:
        """One write, after which the job is no longer this worker's."""
        leases, lease = self._store.leases, self._lease
        if verdict.end == "retry" and self._stop_asked.is_set():
            # Killed after the grace, or broken while it saved: the checkpoint before counts.
            verdict = Verdict("stopped")
        self._context.metrics.attempts.labels(verdict.end).inc()
        tell_verdict(self._span, verdict)
        # Its words are the job's own, in the store: they may quote what a file says.
        log_fields(logging.INFO, "attempt settled", end=verdict.end, code=verdict.code)
        error = {"code": verdict.code, "message": verdict.message, "param": None}
        if verdict.end == "stopped":
            job = await self._call.insist(leases.stopped, lease)
        elif verdict.end == "postponed":
            # Not evenly: two that waited in step would try the same two GPUs for ever, each the other one's.
            delay = self._context.limits.recheck_seconds * random.uniform(0.5, 1.5)
            job = await self._call.insist(leases.postponed, lease, verdict.message, delay)
        elif verdict.end == "failed":
            job = await self._call.insist(leases.fail, lease, error)
        else:
            limits = self._context.limits
            failures = max(self._context.max_attempts - self.keeper.job.attempts_left, 1)
            delay = backoff_seconds(failures, base=limits.backoff_base_seconds, limit=limits.backoff_limit_seconds)
            job = await self._call.insist(leases.retry, lease, error, delay_seconds=delay)
        if job.is_terminal:
            tell_whole_life(self._context.tracer, job, job.status)
