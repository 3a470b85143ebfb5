"""A fault drill on the real processes under load: what is promised for each fault holds, and its alert fires.

Server, worker, PostgreSQL and Prometheus. One fault after another on one installation, as in a bad week; each test
leaves it well. The full disk has an installation of its own, as the shipped one is without PostgreSQL: SQLite and
everything else on the disk that fills up. Where the trainer matters it is the real one; in the two tests of the store
it is the stand-in that speaks its contract. It takes root, Linux, and Debian's Prometheus and PostgreSQL: `make
test-ops`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from model_core.manifest import verify_folder
from service.jobs.store import Store, open_store
from tests.operations.alerting import Alerts, hurried, run_prometheus
from tests.operations.plant import ROOT, Plant, run_plant, until
from tests.operations.traffic import (
    CHAT,
    JOBS,
    MODEL,
    Tally,
    Traffic,
    create_job,
    job,
    standin_file,
    training_file,
    upload,
)
from tests.service.jobs.postgres import Cluster, run_cluster

_DISK = "1400m"
_KINDS = ["text", "image", "stream"]
_SUBMITTERS = 6
_ALERTS = ("DveNoWorker", "DveDown", "DveStoreUnreachable", "DveDiskFull", "DveJobFailed", "DveModelNotLoading")

drilled = [
    pytest.mark.heavy,
    pytest.mark.ops,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed (make test-ops does)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk"),
]


def drill_mark(test):
    for mark in drilled:
        test = mark(test)
    return test


@dataclass
class Drill:
    plant: Plant
    cluster: Cluster | None
    alerts: Alerts
    store: Store
    http: httpx.Client
    is_real: bool = True

    def work(self, *, is_real: bool) -> None:
        """A worker with the real trainer, or with the stand-in."""
        if is_real != self.is_real:
            self.plant.running["worker"].stop()
            self.plant.start_worker(is_real=is_real)
            self.is_real = is_real

    def begin_job(self, steps: int) -> str:
        """A job that has saved something. Of the real trainer 3 steps are an epoch."""
        if self.is_real:
            job_id = create_job(self.http, training_file(), epochs=steps // 3)
        else:
            plan = {"steps": steps, "step_seconds": 0.1, "checkpoint_every": 5}
            job_id = create_job(self.http, standin_file(**plan))
        until(lambda: self.store.jobs.checkpoints(job_id)[0], "the first checkpoint", 400)
        return job_id

    def until_ended(self, job_id: str, seconds: float = 600) -> dict:
        ended = ("succeeded", "failed", "cancelled")
        until(lambda: self.store.jobs.get(job_id).status in ended, f"{job_id} has not ended", seconds)
        return job(self.http, job_id)

    def load(self) -> Traffic:
        return Traffic(self.plant.url, num_threads=2, kinds=_KINDS).start()


def check_unnoticed(tally: Tally) -> None:
    assert tally.wrong == [] and tally.total > 0


@contextlib.contextmanager
def install(folder: Path, data_dir: Path, cluster: Cluster | None) -> Iterator[Drill]:
    """Everything runs and no alert fires. Without a cluster the store is SQLite's, in the data folder."""
    url = None if cluster is None else cluster.new_database()
    # Beside a load that never lets up, a trainer of the usual lower priority would hardly get on.
    settings = {"kv_cache_bytes": str(64 * 2**20), "worker_nice": "0"} | ({} if url is None else {"database_url": url})
    with (
        run_plant(folder, data_dir, **settings) as plant,
        httpx.Client(base_url=plant.url, timeout=120) as http,
        run_prometheus(folder, plant) as alerts,
    ):
        plant.start_server()
        plant.start_worker()
        with contextlib.closing(open_store(url, plant.data_dir)) as store:
            alerts.wait_until_silent(*_ALERTS)
            yield Drill(plant, cluster, alerts, store, http)


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Drill]:
    folder = tmp_path_factory.mktemp("drill")
    with run_cluster() as cluster, install(folder, folder / "data", cluster) as drill:
        yield drill


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Drill]:
    """All of the data folder on a disk that can be filled, SQLite's file too."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "dve-drill", str(disk)], check=True)
    try:
        with install(tmp_path, disk / "data", None) as drill:
            yield drill
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@drill_mark
def test_a_killed_worker(drill: Drill) -> None:
    """The job goes on from its last checkpoint with the same freeze table, and serving never notices."""
    drill.work(is_real=True)
    job_id = drill.begin_job(120)
    traffic = drill.load()
    before = drill.store.jobs.get(job_id)
    saved = drill.store.jobs.checkpoints(job_id)[0][0].step
    drill.plant.running["worker"].kill()
    drill.alerts.wait_for("DveNoWorker")
    drill.plant.start_worker()
    done = drill.until_ended(job_id)
    assert done["status"] == "succeeded", done
    after = drill.store.jobs.get(job_id)
    assert after.attempt >= 2 and after.freeze_table == before.freeze_table is not None
    resumed = [e for e in drill.store.jobs.events_since(job_id, 0, limit=10_000)[1] if e.kind == "resumed"]
    assert resumed and resumed[0].global_step >= saved
    drill.alerts.wait_until_silent("DveNoWorker")
    check_unnoticed(traffic.stop())


@drill_mark
def test_a_server_killed_during_submits(drill: Drill) -> None:
    """Each job exists once or not at all; the worker's job and whoever asks again get on as if nothing had been."""
    drill.work(is_real=False)
    traffic = drill.load()
    running = drill.begin_job(400)
    submits = Submits(drill)
    with ThreadPoolExecutor(_SUBMITTERS) as pool:
        rounds = [pool.submit(submits.go_on) for _ in range(_SUBMITTERS)]
        until(lambda: len(submits.answered) >= 2 * _SUBMITTERS, "the first submits", 60)
        drill.plant.running["server"].kill()
        assert [one.result(60) for one in rounds] == [None] * _SUBMITTERS
    assert submits.interrupted, "the kill came while none was under way"
    drill.alerts.wait_for("DveDown")
    drill.plant.start_server()
    first = dict(submits.answered)
    stored = {one.id for one in drill.store.jobs.page(limit=100)[0] if one.is_dry_run}
    assert set(first.values()) <= stored, "what was answered is there"
    assert len(stored) <= len(first) + len(submits.interrupted), "what was not answered is there once or not at all"
    for key in submits.keys:
        submits.send(key)
    assert {key: submits.answered[key] for key in first} == first, "a job that was answered is the same one"
    made = {one.id for one in drill.store.jobs.page(limit=100)[0] if one.is_dry_run}
    assert stored <= made == set(submits.answered.values()), "what the killed server had written is found again"
    assert len(made) == len(submits.keys), "each exists once"
    drill.alerts.wait_until_silent("DveDown")
    assert drill.until_ended(running)["status"] == "succeeded"
    assert drill.store.jobs.get(running).attempt == 1, "the worker did not notice"
    for job_id in made:
        drill.until_ended(job_id)
    tally = traffic.stop()
    away = tuple(f"{kind}: {status} " for kind in _KINDS for status in (-1, 0, 503))
    assert [one for one in tally.wrong if not one.startswith(away)] == [], "a server that is away, and nothing else"


class Submits:
    """Jobs with keys of their own, asked for by several at once until the server is gone."""

    def __init__(self, drill: Drill) -> None:
        self._url, self._numbers = drill.plant.url, itertools.count()
        uploaded = upload(drill.http, standin_file(steps=1))
        self._body = {"model": MODEL, "training_file": uploaded, "fusion": {"dry_run": True}}
        self.keys: list[str] = []
        self.answered: dict[str, str] = {}
        self.interrupted: list[str] = []

    def send(self, key: str) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            answer = client.post(JOBS, json=self._body, headers={"idempotency-key": key})
        self.answered[key] = answer.json()["id"]

    def go_on(self) -> None:
        for number in self._numbers:
            key = f"drill-{number}"
            try:
                self.keys.append(key)
                self.send(key)
            except httpx.ConnectError:
                return  # it never got in
            except httpx.TransportError:
                self.interrupted.append(key)
                return


@drill_mark
def test_a_database_that_is_away_for_thirty_seconds(drill: Drill) -> None:
    """Serving never notices; the job API says so; the job ends well, at the latest by another attempt."""
    drill.work(is_real=False)
    traffic = drill.load()
    job_id = drill.begin_job(600)
    drill.cluster.stop()
    stopped_at = time.monotonic()
    refused = drill.http.get(f"{JOBS}/{job_id}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
    assert drill.http.get("/health/ready").status_code == 200
    until(lambda: time.monotonic() - stopped_at > 30, "thirty seconds", 40)
    try:
        drill.alerts.wait_for("DveStoreUnreachable", 60)
    finally:
        drill.cluster.start()
    drill.alerts.wait_until_silent("DveStoreUnreachable")
    assert drill.until_ended(job_id)["status"] == "succeeded"
    check_unnoticed(traffic.stop())


def fill(path: Path) -> None:
    """Everything that is left, to the last page: beside a job that writes too, nobody knows beforehand how much."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**20))


@drill_mark
def test_a_full_disk(small_disk: Drill) -> None:
    """A job fails with storage_full, what it saved before is whole, nothing half written stays; uploads are refused."""
    drill = small_disk
    job_id = drill.begin_job(3000)
    traffic = drill.load()
    fillers = [drill.plant.data_dir.parent / f"filler-{number}" for number in range(2)]
    fill(fillers[0])
    try:
        drill.alerts.wait_for("DveDiskFull")
        failed = drill.until_ended(job_id)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "storage_full"), failed
        drill.alerts.wait_for("DveJobFailed")
        fill(fillers[1])  # what the half-written checkpoint took is free again
        large = {"file": ("t.jsonl", training_file() * 1000)}
        refused = drill.http.post("/v1/files", files=large, data={"purpose": "fine-tune"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        assert drill.http.get("/health/ready").status_code == 200
    finally:
        for filler in fillers:
            filler.unlink(missing_ok=True)
    for row in drill.store.jobs.checkpoints(job_id)[0]:
        assert verify_folder(Path(row.path), deep=True) is not None
    left = [path.name for path in (drill.plant.data_dir / "jobs" / job_id).rglob(".*.tmp")]
    assert left == [], "half-written folders"
    drill.alerts.wait_until_silent("DveDiskFull", "DveJobFailed")
    again = create_job(drill.http)
    assert drill.until_ended(again)["status"] == "succeeded", "with room again it trains"
    check_unnoticed(traffic.stop())


@drill_mark
def test_a_damaged_model(drill: Drill) -> None:
    """checkpoint_corrupt, counted; what is in memory serves on; mended, it loads."""
    drill.work(is_real=True)
    traffic = drill.load()
    made = drill.until_ended(create_job(drill.http), 1200)
    model = made["fine_tuned_model"]
    asked = {"model": model, "messages": [{"role": "user", "content": "what colour?"}], "max_tokens": 4}
    until(lambda: drill.http.post(CHAT, json=asked).status_code == 200, "the model answers")
    (shard,) = (drill.plant.data_dir / "models").rglob(f"*{made['id'][-8:]}*/**/*.safetensors")
    whole = shard.read_bytes()
    assert drill.http.post(f"/v1/models/{model}/unload").status_code == 200
    for damaged in (whole[: len(whole) // 2], b"\xff" * 7 + b"\x0f" + whole[8:]):
        shard.write_bytes(damaged)
        refused = drill.http.post(f"/v1/models/{model}/load")
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "checkpoint_corrupt"
    counted = [line for line in drill.http.get("/metrics").text.splitlines()
               if line.startswith('dve_model_swaps_total{outcome="failed"}')]  # fmt: skip
    assert counted and float(counted[0].split()[1]) >= 2
    drill.alerts.wait_for("DveModelNotLoading")
    shard.write_bytes(whole)
    assert drill.http.post(f"/v1/models/{model}/load").status_code == 200
    assert drill.http.post(CHAT, json=asked).status_code == 200
    drill.alerts.wait_until_silent("DveModelNotLoading")
    check_unnoticed(traffic.stop())


def test_rules_in_a_hurry_are_the_shipped_ones() -> None:
    shipped = (ROOT / "deploy/prometheus/rules.yml").read_text()
    fast = hurried(shipped)
    assert len(fast.splitlines()) == len(shipped.splitlines())
    changed = [(a, b) for a, b in zip(shipped.splitlines(), fast.splitlines(), strict=True) if a != b]
    assert all("for:" in a or "_age_seconds" in a or "[" in a for a, _ in changed)
    assert "dve_store_answer_age_seconds > 18\n" in fast and "for: 1m" not in fast
    assert {f"- alert: {name}\n" in fast for name in _ALERTS} == {True}
