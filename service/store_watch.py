"""What a scrape tells of the store and its disk, looked at from time to time by every server and every worker.

In: the store, the data folder, the gauges. Out: gauges that are set. It blocks (call it in a thread), and changes
nothing. How long the store has been silent is told by a gauge that reads the clock itself, so that a look that hangs
shows too.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from service.jobs.job import STATUSES
from service.jobs.store import Store
from service.metrics import StoreMetrics

#: A worker beats every ten seconds.
_SEEN_WITHIN_SECONDS = 60.0


class StoreWatch:
    """`look` may be called from any thread, by one at a time."""

    def __init__(self, store: Store, data_dir: Path, metrics: StoreMetrics) -> None:
        self._store, self._metrics = store, metrics
        self._data_dir = data_dir.absolute()

    def look(self) -> None:
        """Raises StoreUnavailableError, and OSError where the disk can't be asked."""
        usage = shutil.disk_usage(next(one for one in (self._data_dir, *self._data_dir.parents) if one.exists()))
        self._metrics.disk_free_bytes.set(usage.free)
        self._metrics.disk_free_ratio.set(usage.free / usage.total)
        found = self._store.jobs.counts()
        for status in STATUSES:
            self._metrics.jobs.labels(status).set(found.get(status, 0))
        self._metrics.progress_age.set(self._store.jobs.longest_silence())
        self._metrics.workers.set(len(self._store.workers.list(seen_within_seconds=_SEEN_WITHIN_SECONDS)))
        self._metrics.store_answered()
