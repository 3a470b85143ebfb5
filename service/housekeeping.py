"""What a store needs done from time to time, by whichever server runs: nobody's job waits for a worker to do it.

In: the store and the folder of files. Out: jobs of lost workers settled, files and events past their time gone, and
what the metrics tell of store, jobs and workers. A store that does not answer is asked again later. It decides nothing
about a job that a lease still covers.
"""

from __future__ import annotations

import asyncio
import logging

from model_core.errors import DualVisionError
from service.jobs.files import FileFolder
from service.jobs.store import Store
from service.logs import log_fields
from service.metrics import Metrics

#: A worker beats every 10 s.
_ALIVE_SECONDS = 30.0
_PURGE_SECONDS = 60.0
_WORKER_SECONDS = 24 * 3600.0


async def keep_house(store: Store, folder: FileFolder, event_retention_seconds: float, metrics: Metrics) -> None:
    """Runs until it is cancelled."""
    every = min(max(store.leases.lease_seconds / 6, 0.1), 5.0)
    clock, next_purge = asyncio.get_running_loop().time, 0.0
    while True:
        try:
            if count := await asyncio.to_thread(store.leases.reap):
                log_fields(logging.WARNING, "settled jobs of lost workers", count=count)
            if clock() >= next_purge:
                next_purge = clock() + _PURGE_SECONDS
                await asyncio.to_thread(purge, store, folder, event_retention_seconds)
            await asyncio.to_thread(observe, store, metrics)
        except (DualVisionError, OSError) as error:
            metrics.store.up.set(0)
            log_fields(
                logging.WARNING, "the store could not be kept in order", error=type(error).__name__, reason=str(error)
            )
        await asyncio.sleep(every)


def observe(store: Store, metrics: Metrics) -> None:
    """What the store knows of jobs and workers, for the metrics."""
    metrics.store.set_counts(store.jobs.counts())
    num_alive, age = store.workers.heartbeat(_ALIVE_SECONDS)
    metrics.workers.set(num_alive)
    metrics.worker_heartbeat_age.set(float("nan") if age is None else age)


def purge(store: Store, folder: FileFolder, event_retention_seconds: float) -> None:
    """Drop what has expired: files, events of ended jobs, workers that were not seen for a day."""
    for record in store.files.take_expired():
        folder.delete(record.path)
    folder.drop_stale()
    store.jobs.purge_events(event_retention_seconds)
    store.workers.drop_unseen(_WORKER_SECONDS)
