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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from service.jobs.files import FileFolder
from service.jobs.job import Job, JobEvent, NewJob
from service.jobs.store import Store, open_store
from tests.service.jobs.conftest import cluster as cluster
from tests.service.jobs.postgres import Cluster

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = Path(__file__).with_name("worker_program.py")
LEASE_SECONDS = 10.0


class Nursery:
    """The process that workers are forked from."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def ask(self, **wanted: Any) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Worker:
    """One worker's process."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self._nursery, self.pid = nursery, pid
        self.exit_code: int | None = None

    def signal(self, number: int) -> None:
        if self.exit_code is None:
            os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        if self.exit_code is None:
            self.exit_code = self._nursery.ask(wait=self.pid)
        return self.exit_code

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()


class Bench:
    """What a test of the worker works with."""

    def __init__(self, folder: Path, nursery: Nursery, database_url: str | None = None) -> None:
        self.data_dir, self.database_url = folder / "data", database_url
        self.folder, self._nursery = folder, nursery
        # Until its files are read a job has as many attempts as this says, then as many as the worker's settings.
        self.store: Store = open_store(database_url, self.data_dir, max_attempts=200)
        self.files = FileFolder(self.data_dir)
        self.workers: list[Worker] = []
        self._numbers = itertools.count()

    def submit(self, *, is_dry_run: bool = False, priority: int = 0, num_gpus: int = 0, **plan: Any) -> str:
        witness = str(self.folder / f"{next(self._numbers)}.witness")
        text = json.dumps({"steps": 5, "witness": witness, **plan})
        file_id, path, num_bytes = self.files.write(text.encode(), "fine-tune", "someone")
        self.store.files.add(file_id, "someone", "plan", purpose="fine-tune", num_bytes=num_bytes, path=path)
        config = {"datasets": [{"data_path": file_id}]}
        chosen: dict[str, Any] = {"is_dry_run": is_dry_run, "priority": priority, "num_gpus": num_gpus}
        return self.store.jobs.create(NewJob("someone", "dve-demo", file_id, config, 0, **chosen))[0].id

    def set_gpus(self, *free_gib: int) -> None:
        """What nvidia-smi tells from now on, to workers that start and to those that run: GPUs of 80 GiB."""
        folder = self.folder / "programs"
        folder.mkdir(exist_ok=True)
        lines = "".join(f"{index}, {80 * 1024}, {free * 1024}\\n" for index, free in enumerate(free_gib))
        made = folder / "nvidia-smi.new"
        made.write_text(f"#!/bin/sh\nprintf '{lines}'\n")
        made.chmod(0o755)
        made.rename(folder / "nvidia-smi")

    def worker(
        self, *, lease: float = LEASE_SECONDS, once: bool = False, poll: float = 0.05, is_hasty: bool = True,
        environment: Mapping[str, str] | None = None, **flags: Any,
    ) -> Worker:  # fmt: skip
        """A worker's process; its log lies beside the data."""
        log = str(self.folder / f"worker-{len(self.workers)}.log")
        if self.database_url is not None:
            flags["database_url"] = self.database_url
        path = os.pathsep.join([str(self.folder / "programs"), os.environ["PATH"]])
        pid = self._nursery.ask(
            data_dir=str(self.data_dir), lease=lease, log=log, flags=flags, once=once, poll=poll, is_hasty=is_hasty,
            environment={"PATH": path, **(environment or {})},
        )  # fmt: skip
        self.workers.append(Worker(self._nursery, pid))
        return self.workers[-1]

    def job(self, job_id: str) -> Job:
        return self.store.jobs.get(job_id)

    def events(self, job_id: str) -> list[JobEvent]:
        return self.store.jobs.events_since(job_id, 0, limit=100_000)[1]

    def steps(self, job_id: str) -> list[int]:
        return [event.global_step for event in self.events(job_id) if event.kind == "step"]

    def until(self, is_so: Callable[[], bool], seconds: float = 90.0) -> None:
        end = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > end:
                raise TimeoutError(self.logs())
            time.sleep(0.01)

    def until_status(self, job_id: str, *statuses: str, seconds: float = 90.0) -> Job:
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
        for worker in self.workers:
            worker.end()
        self.store.close()


def final_state(steps: int) -> str:
    """The stand-in's weights after an undisturbed run."""
    state = ""
    for step in range(1, steps + 1):
        state = hashlib.sha256(f"{state}{step}".encode()).hexdigest()
    return state


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def bench(tmp_path: Path, nursery: Nursery) -> Iterator[Bench]:
    made = Bench(tmp_path, nursery)
    yield made
    made.end()


@pytest.fixture
def postgres_bench(tmp_path: Path, nursery: Nursery, cluster: Cluster) -> Iterator[Bench]:
    made = Bench(tmp_path, nursery, cluster.new_database())
    yield made
    made.end()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, nursery: Nursery) -> Iterator[Bench]:
    """A bench with one worker of three slots, for all tests of a module."""
    made = Bench(tmp_path_factory.mktemp("served"), nursery)
    made.worker(worker_concurrency=3, job_max_attempts=2, worker_grace_seconds=1)
    yield made
    made.end()
