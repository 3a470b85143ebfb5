"""The crash matrix: whatever is killed or stands still, no job is lost, none runs twice at once, no event is lost.

The stand-in trainer holds its job's witness lock as long as it lives, and its weights are a hash of all steps in order.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from service.jobs.database import SQLITE_NAME
from service.jobs.job import Lease, LeaseLostError
from tests.service.supervisor.conftest import Bench, Worker, final_state

LEASE, HEAVY_LEASE = 1.0, 2.0
#: Where it matters that no attempt is lost for another reason: on a busy machine a second is soon over.
CALM_LEASE = 3.0
KINDS = ("trainer", "supervisor", "stopped supervisor", "database")
FLAGS = {"worker_concurrency": 2, "job_max_attempts": 200, "worker_grace_seconds": 2}


class Chaos:
    """Two workers, two slots, and somebody who kills."""

    def __init__(self, bench: Bench, seed: int, lease: float) -> None:
        self.bench, self.random, self.steps, self.lease = bench, random.Random(seed), 60, lease
        self.jobs: list[str] = []
        self.counts = dict.fromkeys(KINDS, 0)
        for _ in range(2):
            self.start_worker()

    def start_worker(self) -> None:
        self.bench.worker(lease=self.lease, **FLAGS)

    def disturb(self, kind: str) -> None:
        """Once, while a trainer runs; returns when training goes on."""
        job_id = self.running_job()
        self.bench.until(lambda: self.is_at_work(job_id))
        time.sleep(self.random.random() * 0.4)
        {
            "trainer": self.kill_trainer, "supervisor": self.kill_supervisor,
            "stopped supervisor": self.stop_supervisor, "database": self.lose_database,
        }[kind](job_id)  # fmt: skip
        self.counts[kind] += 1
        reached = self.bench.job(job_id).global_step
        self.bench.until(lambda: self.bench.job(job_id).global_step > reached or self.is_over(job_id), 60)

    def running_job(self) -> str:
        """One that has not ended, made if there is none."""
        unfinished = [job_id for job_id in self.jobs if not self.is_over(job_id)]
        if not unfinished:
            unfinished = [self.bench.submit(steps=self.steps, step_seconds=0.02, write_seconds=0.02)]
            self.jobs += unfinished
        return unfinished[0]

    def is_at_work(self, job_id: str) -> bool:
        return bool(self.bench.trainer_pids(job_id)) or self.is_over(job_id)

    def is_over(self, job_id: str) -> bool:
        return self.bench.job(job_id).is_terminal

    def kill_trainer(self, job_id: str) -> None:
        for pid in self.bench.trainer_pids(job_id):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_supervisor(self, job_id: str) -> None:
        worker = self.holder(job_id)
        worker.end()
        self.bench.workers.remove(worker)
        self.start_worker()

    def stop_supervisor(self, job_id: str) -> None:
        """For longer than its lease: another worker takes the job, and the stopped one wakes up to find it gone."""
        worker = self.holder(job_id)
        worker.signal(signal.SIGSTOP)
        time.sleep(self.lease * (0.5 + self.random.random()))
        worker.signal(signal.SIGCONT)

    def lose_database(self, _job_id: str) -> None:
        """SQLite: its write lock in other hands, longer than the lease or not. PostgreSQL: every connection ended."""
        if self.bench.database_url is not None:
            with psycopg.connect(self.bench.database_url, autocommit=True) as connection:
                others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                assert connection.execute(f"SELECT pg_terminate_backend(pid) {others}").fetchall()
            return
        with locked(self.bench.data_dir / SQLITE_NAME):
            time.sleep(self.lease * (0.3 + 1.5 * self.random.random()))

    def holder(self, job_id: str) -> Worker:
        """The worker that holds the job, or any."""
        owner = self.bench.job(job_id).lease_owner or ""
        found = [worker for worker in self.bench.workers if f":{worker.pid}:" in owner]
        return (found or self.bench.workers)[0]

    def verify(self) -> None:
        for job_id in self.jobs:
            job = self.bench.until_status(job_id, "succeeded", "failed", seconds=60)
            assert job.status == "succeeded", f"{job.error}\n{self.bench.logs()}"
            assert self.bench.steps(job_id) == list(range(1, self.steps + 1))
            assert [e.kind for e in self.bench.events(job_id)].count("summary") == 1
            record = self.bench.store.models.get(job.fine_tuned_model or "")
            assert record is not None
            assert Path(record.path, "state").read_text() == final_state(self.steps)
            saved = {event.global_step for event in self.bench.events(job_id) if event.kind == "checkpoint"}
            assert saved >= set(range(5, self.steps + 1, 5))
            listed = self.bench.store.jobs.checkpoints(job_id, limit=10_000)[0]
            assert listed and all(Path(row.path).is_dir() for row in listed)
            assert all(Path(row.path).parent.name == f"attempt-{job.attempt}" for row in listed[1:])
        assert list(self.bench.folder.glob("*.twice")) == []
        assert self.bench.trainer_pids() == []


def stop_between_writes(bench: Bench, worker: Worker) -> None:
    """SQLite has one lock for all who write: whoever is stopped while holding it stops everybody."""
    for _ in range(100):
        worker.signal(signal.SIGSTOP)
        with contextlib.suppress(sqlite3.OperationalError), locked(bench.data_dir / SQLITE_NAME, timeout=0.3):
            return
        worker.signal(signal.SIGCONT)
        time.sleep(0.01)
    raise AssertionError("it was always writing")


@contextlib.contextmanager
def locked(path: Path, timeout: float = 30) -> Iterator[None]:
    """The store's write lock in other hands."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=timeout)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def run_matrix(bench: Bench, num_kills: int, seed: int, lease: float) -> dict[str, int]:
    chaos = Chaos(bench, seed, lease)
    kinds = list(KINDS) + [chaos.random.choice(KINDS) for _ in range(max(num_kills - len(KINDS), 0))]
    for kind in kinds[:num_kills]:
        chaos.disturb(kind)
    chaos.verify()
    return chaos.counts


def test_five_kills_lose_nothing(bench: Bench) -> None:
    assert sum(run_matrix(bench, 5, seed=7, lease=LEASE).values()) == 5


@pytest.mark.heavy
@pytest.mark.timeout(3000)
def test_a_hundred_kills_lose_nothing(bench: Bench) -> None:
    counts = run_matrix(bench, 100, seed=20261125, lease=HEAVY_LEASE)
    assert sum(counts.values()) == 100
    assert min(counts.values()) > 10


@pytest.mark.heavy
@pytest.mark.timeout(3000)
def test_a_hundred_kills_lose_nothing_on_postgresql(postgres_bench: Bench) -> None:
    counts = run_matrix(postgres_bench, 100, seed=20261126, lease=HEAVY_LEASE)
    assert sum(counts.values()) == 100
    assert min(counts.values()) > 10


def test_a_stalled_worker_is_fenced_out_and_its_child_dead_before_the_other_starts(bench: Bench) -> None:
    """The other worker's first attempt is the one that goes on: it took two, since what it wrote of the first one's
    events kept its own renewals out of the database."""
    job_id = bench.submit(steps=100_000, step_seconds=0.02)
    stalled = bench.worker(lease=CALM_LEASE, **FLAGS)
    bench.until_step(job_id, 3)
    other = bench.worker(lease=CALM_LEASE, **FLAGS)
    stop_between_writes(bench, stalled)
    held = bench.job(job_id)  # what it holds now: while it was being stopped it may have been too late once
    stale = held.lease_owner
    assert stale is not None and f":{stalled.pid}:" in stale
    before = set(bench.trainer_pids(job_id))
    seen_together = []

    def is_taken_over() -> bool:
        pids = set(bench.trainer_pids(job_id))
        if pids & before and pids - before:
            seen_together.append(pids)
        return bool(pids) and not pids & before

    bench.until(is_taken_over)
    assert seen_together == []
    bench.until(lambda: bench.job(job_id).global_step > held.global_step)
    taken = bench.job(job_id)
    assert taken.attempt == held.attempt + 1, bench.logs()
    assert f":{other.pid}:" in (taken.lease_owner or "")
    with pytest.raises(LeaseLostError):
        bench.store.leases.append_events(Lease(job_id, held.attempt, stale, CALM_LEASE), [])
    stalled.signal(signal.SIGCONT)
    bench.until(lambda: "dropped out" in (bench.folder / "worker-0.log").read_text())
    bench.cancel(job_id)
    assert list(bench.folder.glob("*.twice")) == []
    assert bench.steps(job_id) == list(range(1, bench.job(job_id).global_step + 1))
