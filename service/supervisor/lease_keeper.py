"""Keeps one lease alive, and knows until when this process may believe that the job is its own.

In: a claim. Out: the job as the store last showed it; `keep` ends by LeaseLostError alone. Time is counted from before
a renewal is sent, so that this side always gives up first. It refuses to know processes: it tells `on_renewed`.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from service.errors import StorageFullError, StoreUnavailableError
from service.jobs.job import Claim, Job, Lease, LeaseLostError
from service.jobs.leases import Leases
from service.logs import log_fields, logger

P = ParamSpec("P")
R = TypeVar("R")
RENEWALS_PER_LEASE = 6
#: Of the lease: given up so long before the store does, for a clock that runs slower and a kill that takes a moment.
_MARGIN_RATIO = 0.1
#: What a later try may cure.
PASSING = (StoreUnavailableError, StorageFullError)
_RETRY_SECONDS = 0.1


class StoreThreads:
    """Calls of the store, which block, in threads of their own."""

    def __init__(self, pool: Executor) -> None:
        self._pool = pool

    async def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        # In the caller's context: a thread's log lines have the job's ids too.
        call = partial(contextvars.copy_context().run, function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def insist(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Again and again while the store does not answer; whoever waits is cancelled when the lease is over."""
        while True:
            try:
                return await self(function, *args, **kwargs)
            except PASSING as error:
                logger.warning("the store does not answer, trying again: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)


class LeaseKeeper:
    """One claim's lease. claimed_at: `time.monotonic()` before the claim was sent."""

    def __init__(self, leases: Leases, call: StoreThreads, claim: Claim, claimed_at: float) -> None:
        self.job: Job = claim.job
        self.lease: Lease = claim.lease
        self.on_renewed: Callable[[Job], Any] = lambda _job: None
        self._leases, self._call = leases, call
        self._believes_until = claimed_at + self._trusted_seconds
        self.renewed_at = claimed_at

    @property
    def remaining_seconds(self) -> float:
        """How long the job is surely this worker's; what a trainer's deadline is set to."""
        return self._believes_until - time.monotonic()

    async def keep(self) -> None:
        """Renews until it can't. Raises LeaseLostError, at the latest when `remaining_seconds` has run out."""
        while True:
            # From when the last one was sent: what a slow store took of the lease is not waited for again.
            due_in = self.renewed_at + self.lease.seconds / RENEWALS_PER_LEASE - time.monotonic()
            await asyncio.sleep(min(max(due_in, 0.0), max(self.remaining_seconds, 0.0)))
            sent_at = time.monotonic()
            try:
                async with asyncio.timeout(self.remaining_seconds):
                    job = await self._call(self._leases.renew, self.lease)
            except TimeoutError:
                raise self._lost("the store did not answer in time") from None
            except PASSING as error:
                logger.warning("the lease could not be renewed yet: %s", error)
                if self.remaining_seconds <= 0:
                    raise self._lost("the store did not answer in time") from None
                await asyncio.sleep(_RETRY_SECONDS)
                continue
            if self.remaining_seconds <= 0:  # this process stood still meanwhile, and its trainer has stopped
                raise self._lost("this worker stood still for longer than its lease")
            self._believes_until = sent_at + self._trusted_seconds
            self.renewed_at = sent_at
            self.job = job
            self.on_renewed(job)

    @property
    def _trusted_seconds(self) -> float:
        return self.lease.seconds * (1 - _MARGIN_RATIO)

    def _lost(self, why: str) -> LeaseLostError:
        return LeaseLostError(f"the lease is over: {why}", value=f"{self.lease.job_id}, attempt {self.lease.attempt}")


async def work_under(keeper: LeaseKeeper, work: Coroutine[Any, Any, None], end_child: Callable[[], Any]) -> None:
    """Work until it is done or the lease is lost, whichever comes first; then no child is left.

    end_child: an async function that kills what runs and waits for its end. A lost lease is told, not raised; what
    else the work raises passes.
    """
    tasks = [asyncio.create_task(work), asyncio.create_task(keeper.keep())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_child()
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    if ends[0] is None:
        return  # settled; a renewal that was on its way then found no lease any more
    for end in ends:
        if isinstance(end, LeaseLostError):
            log_fields(logging.WARNING, "dropped out of the job", reason=str(end))
        elif isinstance(end, Exception):
            raise end
