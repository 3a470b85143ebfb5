"""What a scrape tells of jobs, workers, the store's silence and the disk, on both databases."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from service.errors import StoreUnavailableError
from service.jobs.store import Store
from service.metrics import StoreMetrics
from service.store_watch import StoreWatch
from tests.service.conftest import LiveServer
from tests.service.jobs.player import Player, add_file, new_job
from tests.service.jobs.rows import jsonl


class Gauges:
    """The gauges on a registry of their own, under a clock that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0
        self._registry = CollectorRegistry()
        self.metrics = StoreMetrics(self._registry, lambda: self.now)

    def __getitem__(self, name: str) -> float | None:
        stem, _, status = name.partition(":")
        return self._registry.get_sample_value(f"dve_{stem}", {"status": status} if status else {})


def test_jobs_and_workers_are_counted(store: Store, tmp_path: Path) -> None:
    gauges = Gauges()
    watch = StoreWatch(store, tmp_path, gauges.metrics)
    add_file(store)
    store.jobs.create(new_job())
    watch.look()
    assert (gauges["jobs:validating_files"], gauges["jobs:failed"], gauges["workers"]) == (1, 0, 0)
    store.workers.beat("w", "host", 1)
    job = Player(store).start()
    store.workers.beat("w", "host", 1, job_id=job.id)
    watch.look()
    assert (gauges["jobs:validating_files"], gauges["jobs:running"], gauges["workers"]) == (0, 1, 1)
    assert 0 < gauges["job_progress_age_seconds"] < 30, "counted from the attempt's begin, as no step is done"


def test_a_store_that_is_silent_is_seen_though_nobody_can_ask_it(store: Store, tmp_path: Path) -> None:
    gauges = Gauges()
    watch = StoreWatch(store, tmp_path, gauges.metrics)
    gauges.now += 7
    assert gauges["store_answer_age_seconds"] == 7
    watch.look()
    assert gauges["store_answer_age_seconds"] == 0

    class Silent:
        def counts(self) -> dict[str, int]:
            raise StoreUnavailableError("the database does not answer")

    store.jobs = Silent()
    gauges.now += 90
    with pytest.raises(StoreUnavailableError):
        watch.look()
    assert gauges["store_answer_age_seconds"] == 90
    assert 0 < gauges["data_disk_free_ratio"] < 1, "the disk is told of all the same"


def test_a_folder_that_is_not_made_yet_has_a_disk(store: Store, tmp_path: Path) -> None:
    gauges = Gauges()
    StoreWatch(store, tmp_path / "not" / "yet", gauges.metrics).look()
    assert gauges["data_disk_free_bytes"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)


def test_a_server_tells_of_its_store(start: Callable[..., LiveServer]) -> None:
    live = start(job_lease_seconds=0.6)
    file_id = live.openai.files.create(file=("t.jsonl", jsonl()), purpose="fine-tune").id
    live.openai.fine_tuning.jobs.create(model="fake/model:1", training_file=file_id)
    deadline = time.monotonic() + 60
    while live.metric('dve_jobs{status="validating_files"}') != 1:
        assert time.monotonic() < deadline
    assert live.metric("dve_store_answer_age_seconds") < 60
