"""The loop of one worker: takes slots, claims jobs, runs them beside each other, drains when it is told to.

In: what all runs share, the devices, signals. Out: an exit code, with no child left. It runs in the main thread, since
a trainer dies with the thread that started it; the store is asked in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.jobs.job import Claim
from service.logs import job_id_var, log_failure, log_fields, logger
from service.store_watch import StoreWatch
from service.supervisor.devices import Device, DeviceLock, LockFolder
from service.supervisor.file_check import FileCheck, FileReader
from service.supervisor.job_run import JobRun, RunContext
from service.supervisor.lease_keeper import PASSING
from service.supervisor.warm_reader import WarmReader

_BEAT_SECONDS = 10.0
_FORGET_WORKERS_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class LoopLimits:
    """poll_seconds: between two looks for work, four times as long while every slot is taken.

    once: end as soon as nothing waits and nothing runs.
    """

    poll_seconds: float = 0.25
    once: bool = False


class WorkerLoop:
    """One worker process."""

    def __init__(
        self, context: RunContext, reader: FileReader, devices: Sequence[Device], locks: LockFolder,
        limits: LoopLimits = LoopLimits(), warm: WarmReader | None = None,
    ) -> None:  # fmt: skip
        self._context, self._reader, self._limits = context, reader, limits
        # In the order in which they are offered work: the one that got some goes to the end, so that a job which does
        # not fit one GPU is tried on the next.
        self._devices, self._locks, self._warm = list(devices), locks, warm
        self.worker_id = f"{socket.gethostname()}:{os.getpid()}:{time.time_ns() % 10**9}"
        self._runs: dict[asyncio.Task[None], JobRun] = {}
        self._checks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._drains = False

    def drain(self) -> None:
        """Claim nothing more; trainers save and stop. A second time they are not waited for."""
        if self._drains:
            for run in self._runs.values():
                run.kill()
        self._drains = True
        self._wake.set()
        for run in self._runs.values():
            run.drain()

    async def run(self) -> int:
        """0 after a drain, or with `once` when nothing is left to do."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.drain)
        names = [device.name for device in self._devices]
        log_fields(logging.INFO, "worker started", worker=self.worker_id, devices=names)
        beating = asyncio.create_task(self._beat())
        self._context.metrics.heartbeat_age.set_function(self._heartbeat_age)
        try:
            await self._serve()
        finally:
            beating.cancel()
            if self._warm is not None:
                await self._warm.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            with contextlib.suppress(*PASSING):
                await self._context.call(self._context.store.workers.remove, self.worker_id)
        log_fields(logging.INFO, "worker ended", worker=self.worker_id)
        return 0

    async def _serve(self) -> None:
        while not self._drains:
            self._wake.clear()
            if self._warm is not None and not self._checks:
                self._warm.prepare()
            found = await self._look_for_work()
            if self._limits.once and not (found or self._runs or self._checks):
                break
            if not found:
                with contextlib.suppress(TimeoutError):
                    is_full = len(self._runs) == len(self._devices)
                    await asyncio.wait_for(self._wake.wait(), self._limits.poll_seconds * (4 if is_full else 1))
        tasks = [*self._runs, *self._checks]
        if tasks:
            await asyncio.wait(tasks)

    def _heartbeat_age(self) -> float:
        """Asked by the thread that serves metrics: it shows a loop that stands still."""
        now = time.monotonic()
        return now - min((run.keeper.renewed_at for run in list(self._runs.values())), default=now)

    async def _look_for_work(self) -> bool:
        """Fills free slots; whether anything was claimed."""
        try:
            if not await self._has_work():
                return False
            return await self._claim_check() | await self._claim_training()
        except PASSING as error:
            logger.warning("can't look for work: %s", error)
        except OSError as error:
            logger.error("can't take a device's lock: %s", error.strerror or error)
        return False

    async def _has_work(self) -> bool:
        """Asked first and without a lock: an idle worker must not be in the way of those that write."""
        can_train = len(self._runs) < len(self._devices)
        num_gpus = int(any(device.gpu is not None for device in self._devices))
        return await self._context.call(
            self._context.store.leases.has_work, num_gpus=num_gpus, can_train=can_train, can_validate=not self._checks
        )

    async def _claim_check(self) -> bool:
        if self._checks or self._drains:
            return False
        sent_at = time.monotonic()
        claim = await self._claim(can_train=False)
        if claim is None:
            return False
        self._start_task(FileCheck(self._context, self._reader, claim, sent_at, self._warm).run(), None)
        return True

    async def _claim_training(self) -> bool:
        busy = {run.device for run in self._runs.values()}
        num_claimed = 0
        for lock in self._locks.free([device for device in self._devices if device not in busy]):
            sent_at = time.monotonic()
            claim = None
            try:
                if not self._drains:
                    num_gpus = 0 if lock.device.gpu is None else 1
                    claim = await self._claim(can_validate=False, num_gpus=num_gpus)
            finally:
                if claim is None:
                    lock.close()
            if claim is None:
                break
            self._start_training(claim, sent_at, lock)
            num_claimed += 1
        return num_claimed > 0

    async def _claim(self, **what: Any) -> Claim | None:
        return await self._context.call(self._context.store.leases.claim, self.worker_id, **what)

    def _start_training(self, claim: Claim, sent_at: float, lock: DeviceLock) -> None:
        run = JobRun(self._context, claim, sent_at, lock)
        self._devices.remove(lock.device)
        self._devices.append(lock.device)
        if self._drains:
            run.drain()
        log_fields(logging.INFO, "claimed", job_id=claim.job.id, attempt=claim.lease.attempt, device=lock.device.name)
        self._start_task(run.run(), run)

    def _start_task(self, work: Any, run: JobRun | None) -> None:
        task = asyncio.create_task(_guarded(work))
        if run is None:
            self._checks.add(task)
        else:
            self._runs[task] = run

        def on_end(ended: asyncio.Task[None]) -> None:
            self._checks.discard(ended)
            self._runs.pop(ended, None)
            self._wake.set()

        task.add_done_callback(on_end)

    async def _beat(self) -> None:
        """A row for people to see; leases, not this, decide about jobs."""
        workers = self._context.store.workers
        watch = StoreWatch(self._context.store, self._context.jobs_folder.parent, self._context.metrics.store)
        while True:
            job_id = next((run.job_id for run in self._runs.values()), None)
            names = [device.name for device in self._devices]
            with contextlib.suppress(*PASSING, OSError):
                await self._context.call(
                    workers.beat, self.worker_id, socket.gethostname(), os.getpid(), names, job_id=job_id
                )
                await self._context.call(workers.drop_unseen, _FORGET_WORKERS_SECONDS)
                await self._context.call(watch.look)
                await self._context.call(self._context.store.database.keep_reserve)
            await asyncio.sleep(_BEAT_SECONDS)


async def _guarded(work: Any) -> None:
    """A run that breaks must not take the others along; its lease runs out, and the job is tried again."""
    try:
        await work
    except Exception as error:  # noqa: BLE001  the worker's border: one job's fault is its own
        log_failure("a run broke", error)
        logger.error("job %s was left; it is tried again when its lease is over", job_id_var.get() or "?")
