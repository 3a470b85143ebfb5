"""A store in a folder, jobs for the stand-in trainer, and workers as real processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.jobs.job import Job, JobEvent, NewJob
from service.jobs.store import Store, open_store

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("worker_program.py")
LEASE_SECONDS = 1.0


class Bench:
    """What a test of the worker works with."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder / "data"
        self.folder = folder
        self.store: Store = open_store(None, self.data_dir, lease_seconds=LEASE_SECONDS)
        self.workers: list[subprocess.Popen[str]] = []
        self._numbers = itertools.count()

    def submit(self, *, is_dry_run: bool = False, priority: int = 0, **plan: Any) -> str:
        path = self.folder / f"plan-{next(self._numbers)}.json"
        path.write_text(json.dumps({"steps": 5, "witness": f"{path}.witness", **plan}))
        new = NewJob(
            "someone", "demo", "file-1", {"train_data_path": str(path)}, 0, is_dry_run=is_dry_run, priority=priority
        )
        return self.store.jobs.create(new)[0].id

    def worker(self, lease: float = LEASE_SECONDS, **flags: Any) -> subprocess.Popen[str]:
        """A worker's process; its log lies beside the data."""
        log = (self.folder / f"worker-{len(self.workers)}.log").open("w")
        words = [f"{name}={value}" for name, value in flags.items()]
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(self.data_dir), str(lease), *words],
            stdout=log, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        )  # fmt: skip
        log.close()
        self.workers.append(process)
        return process

    def job(self, job_id: str) -> Job:
        return self.store.jobs.get(job_id)

    def events(self, job_id: str) -> list[JobEvent]:
        return self.store.jobs.events_since(job_id, 0, limit=100_000)[1]

    def steps(self, job_id: str) -> list[int]:
        return [event.global_step for event in self.events(job_id) if event.kind == "step"]

    def until(self, is_so: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end:
                raise TimeoutError(self.logs())
            time.sleep(0.01)

    def until_status(self, job_id: str, *statuses: str, seconds: float = 30.0) -> Job:
        self.until(lambda: self.job(job_id).status in statuses, seconds)
        return self.job(job_id)

    def until_step(self, job_id: str, step: int) -> None:
        self.until(lambda: self.job(job_id).global_step >= step)

    def cancel(self, job_id: str) -> None:
        self.store.jobs.request(job_id, "cancel")
        self.until_status(job_id, "cancelled")

    def trainer_pids(self, job_id: str = "") -> list[int]:
        """Of the stand-in trainers of a job, or of all, by their recipe's path."""
        found, place = [], f"{self.data_dir}/jobs/{job_id}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    is_dead = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
                except (FileNotFoundError, ProcessLookupError):
                    continue
                is_trainer = any(word.endswith(b"standin_trainer.py") for word in words)
                if is_trainer and not is_dead and any(place in word for word in words):
                    found.append(int(entry.name))
        return found

    def logs(self) -> str:
        paths = [*self.folder.glob("worker-*.log"), *self.data_dir.glob("jobs/*/attempt-*/trainer.log")]
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in paths)

    def end(self) -> None:
        for process in self.workers:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        self.store.close()


def final_state(steps: int) -> str:
    """The stand-in's weights after an undisturbed run."""
    state = ""
    for step in range(1, steps + 1):
        state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
    return state


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench with one worker of three slots, for all tests of a module: starting one takes a second."""
    made = Bench(tmp_path_factory.mktemp("served"))
    made.worker(worker_concurrency=3, max_attempts=2, worker_grace_seconds=2, lease=10.0)
    yield made
    made.end()
