"""The store of training jobs: one database, seen from each side.

In: `open_store(database_url, data_dir)`, which brings the schema up to date under a lock. Out: a `Store`, whose parts
are safe to call from any thread and block (call them in a thread from asyncio). The interface, all of it:

    store.jobs      create, find_earlier, get, page, events, event_seq, events_since, checkpoints, checkpoint,
                    checkpoint_of_model, request (pause, cancel), resume, request_switch, switches, counts,
                    longest_silence, take_stale, purge_events                                         ledger.py
    store.leases    has_work, claim, renew, wishes, append_events, add_checkpoint, forget_checkpoints,
                    drop_checkpoints, mark_switched, validated, stopped, postponed, retry, succeed,
                    fail, register_model, reap                                                        leases.py
    store.files     add, get, page, set_status, delete, take_expired                                  records.py
    store.models    add, get, list, set_status, forget                                                records.py
    store.workers   beat, remove, list, drop_unseen                                                   records.py

A worker's life with one job: `claim` -> (status `validating_files`: read its files, then `validated` or `fail`) or
(status `running`: start the trainer; `renew` every sixth of the lease; `append_events`, `add_checkpoint`; then one of
`succeed`, `stopped` (exit 75), `fail` (exit 78), `retry` (anything else)). Every one of these raises LeaseLostError
once the job is another's. `renew` answers with the job: `requested_action` says what a person wants, and a
`num_switches` larger than before that `jobs.switches` has a mode to hand over (`mark_switched` when it is applied).
"""

from __future__ import annotations

from pathlib import Path

from service.jobs.database import Database, open_database
from service.jobs.leases import Leases
from service.jobs.ledger import Ledger
from service.jobs.records import FileRows, ModelRows, WorkerRows
from service.settings import JobSettings

DEFAULT_LEASE_SECONDS = 30.0
DEFAULT_MAX_ATTEMPTS = 3
DEFAULT_MAX_ACTIVE_JOBS = 1000
DEFAULT_MAX_BYTES_PER_OWNER = 100 * 2**30


class Store:
    """One database of jobs. Close it when its process ends."""

    def __init__(
        self,
        database: Database,
        *,
        lease_seconds: float = DEFAULT_LEASE_SECONDS,
        max_attempts: int = DEFAULT_MAX_ATTEMPTS,
        max_active_jobs: int = DEFAULT_MAX_ACTIVE_JOBS,
        max_bytes_per_owner: int = DEFAULT_MAX_BYTES_PER_OWNER,
    ) -> None:
        self.database = database
        self.jobs = Ledger(database, max_attempts, max_active_jobs)
        self.leases = Leases(database, lease_seconds, max_attempts)
        self.files = FileRows(database, max_bytes_per_owner)
        self.models = ModelRows(database)
        self.workers = WorkerRows(database)

    def close(self) -> None:
        self.database.close()


def store_of(settings: JobSettings) -> Store:
    """The store that the settings of the jobs name. Raises ConfigError, StoreUnavailableError."""
    url = settings.database_url
    return open_store(
        url.get_secret_value() if url else None,
        settings.data_dir,
        lease_seconds=settings.job_lease_seconds,
        max_attempts=settings.job_max_attempts,
        max_active_jobs=settings.max_active_jobs_per_key,
        max_bytes_per_owner=settings.max_file_bytes_per_key,
    )


def open_store(
    database_url: str | None,
    data_dir: str | Path,
    *,
    lease_seconds: float = DEFAULT_LEASE_SECONDS,
    max_attempts: int = DEFAULT_MAX_ATTEMPTS,
    max_active_jobs: int = DEFAULT_MAX_ACTIVE_JOBS,
    max_bytes_per_owner: int = DEFAULT_MAX_BYTES_PER_OWNER,
) -> Store:
    """A store with an up-to-date schema: PostgreSQL by its URL, without one SQLite in the data folder.

    max_active_jobs, max_bytes_per_owner: what one key may have. Raises ConfigError, StoreUnavailableError.
    """
    database = open_database(database_url, data_dir)
    try:
        database.migrate()
    except BaseException:
        database.close()
        raise
    return Store(
        database,
        lease_seconds=lease_seconds,
        max_attempts=max_attempts,
        max_active_jobs=max_active_jobs,
        max_bytes_per_owner=max_bytes_per_owner,
    )
