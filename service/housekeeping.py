"""What a store needs done from time to time, by whichever server runs: nobody's job waits for a worker to do it.

In: the store, the folder of files, what measures both. Out: jobs of lost workers settled, files and events past their
time gone, gauges set. A store that does not answer is asked again later. It decides nothing about a job that a lease
still covers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from pathlib import Path

from model_core.errors import DualVisionError
from service.jobs.files import FileFolder
from service.jobs.store import Store
from service.logs import log_fields
from service.store_watch import StoreWatch

_PURGE_SECONDS = 60.0
_WORKER_SECONDS = 24 * 3600.0
_JOBS_AT_ONCE = 500


async def keep_house(
    store: Store, folder: FileFolder, watch: StoreWatch, event_retention_seconds: float
) -> None:  # fmt: skip
    """Runs until it is cancelled."""
    every = min(max(store.leases.lease_seconds / 6, 0.1), 5.0)
    clock, next_purge = asyncio.get_running_loop().time, 0.0
    while True:
        try:
            await asyncio.to_thread(watch.look)
            if count := await asyncio.to_thread(store.leases.reap):
                log_fields(logging.WARNING, "settled jobs of lost workers", count=count)
            if clock() >= next_purge:
                next_purge = clock() + _PURGE_SECONDS
                await asyncio.to_thread(purge, store, folder, event_retention_seconds)
        except (DualVisionError, OSError) as error:
            log_fields(
                logging.WARNING, "the store could not be kept in order", error=type(error).__name__, reason=str(error)
            )
        await asyncio.sleep(every)


def purge(store: Store, folder: FileFolder, event_retention_seconds: float) -> None:
    """Drop what has expired: files, events and folders of ended jobs, workers that were not seen for a day."""
    for record in store.files.take_expired():
        folder.delete(record.path)
    folder.drop_stale()
    store.jobs.purge_events(event_retention_seconds)
    purge_jobs(store, folder.data_dir / "jobs", event_retention_seconds)
    store.workers.drop_unseen(_WORKER_SECONDS)


def purge_jobs(store: Store, root: Path, retention_seconds: float) -> None:
    """Folders of jobs below `root`: checkpoints, recipes, logs. Published models lie elsewhere and stay.

    What the store does not know is left alone: it may be another store's.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    except FileNotFoundError:
        return
    for begin in range(0, len(names), _JOBS_AT_ONCE):
        for job_id in store.jobs.take_stale(names[begin : begin + _JOBS_AT_ONCE], retention_seconds):
            # Killed in between, the folder is found again: its job is as stale as before.
            shutil.rmtree(root / job_id, ignore_errors=True)
            log_fields(logging.INFO, "a job's folder was cleared away", job_id=job_id)
