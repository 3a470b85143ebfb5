"""The doctor on jobs: the store and its schema, the workers.

In: settings. Out: findings, and how far the store's clock is off. It only reads.
"""

from __future__ import annotations

import time

from model_core.errors import ConfigError, DualVisionError
from service.doctor.finding import Finding, fail, of_error, ok, warn
from service.jobs.database import SQLITE_NAME, Database, open_database, refuse_network_file_system
from service.jobs.job import TERMINAL
from service.jobs.store import Store
from service.settings import JobSettings

_ALIVE_SECONDS = 30.0


def look_at_jobs(settings: JobSettings) -> tuple[list[Finding], float | None]:
    """Store and workers; and the store's clock less ours, None where they are one."""
    url = settings.database_url
    path = settings.data_dir.absolute() / SQLITE_NAME
    if url is None and not path.exists():
        try:
            refuse_network_file_system(settings.data_dir.absolute())
        except ConfigError as error:
            return [of_error("store", error)], None
        return [ok("store", f"{path} will be made at the first start"), _workers(None, {})], None
    try:
        database = open_database(None if url is None else url.get_secret_value(), settings.data_dir)
    except DualVisionError as error:
        return [of_error("store", error)], None
    try:
        return _look(database)
    except DualVisionError as error:
        return [of_error("store", error, "Start the database, or look at DVE_DATABASE_URL and the network")], None
    finally:
        database.close()


def _look(database: Database) -> tuple[list[Finding], float | None]:
    revision, head, is_known = database.revision()
    kind = "SQLite" if database.is_sqlite else "PostgreSQL"
    skew = None if database.is_sqlite else database.now() - time.time()
    if not is_known:
        remedy = "Run the newer program, or restore a backup"
        return [fail("store", f"{kind}: schema {revision} is newer than this program's {head}", remedy)], skew
    if revision is None:
        return [ok("store", f"{kind} answers, empty: the first start makes the schema"), _workers(None, {})], skew
    if revision != head:
        remedy = "Back it up; the next start brings it up to date"
        return [warn("store", f"{kind} answers, schema {revision} of {head}", remedy)], skew
    store = Store(database)
    counts = store.jobs.counts()
    waiting = {status: count for status, count in counts.items() if count and status not in TERMINAL | {"paused"}}
    num_alive, age = store.workers.heartbeat(_ALIVE_SECONDS)
    return [ok("store", f"{kind} answers, schema {head}"), _workers(age, waiting, num_alive)], skew


def _workers(age: float | None, waiting: dict[str, int], num_alive: int = 0) -> Finding:
    """age: since the last heartbeat of any; None: none is known."""
    if num_alive:
        return ok("workers", f"{num_alive} heard of in the last {_ALIVE_SECONDS:g} s")
    jobs = ", ".join(f"{count} {status}" for status, count in waiting.items())
    last = "none is known" if age is None else f"the last was heard of {age:.0f} s ago"
    remedy = "Start one: `dve worker`, with the server's data_dir and database_url"
    if jobs:
        return fail("workers", f"{last}, and there are jobs: {jobs}", remedy)
    if age is not None:
        return warn("workers", f"{last} and did not sign off", remedy)
    return ok("workers", "none, and no job waits; serving needs none")
