"""How long a job waits for an idle worker, how late its events are, what watching it costs; see figures.json."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

import pytest

from tests.service.supervisor.conftest import Bench, Worker

pytestmark = pytest.mark.heavy


def cpu_seconds(worker: Worker) -> float:
    words = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def test_submit_to_running_event_lag_and_cost(bench: Bench, tmp_path: Path) -> None:
    worker = bench.worker(lease=30.0, poll=0.25, is_hasty=False)
    bench.until(lambda: bool(bench.store.workers.list()))
    waits = []
    for _ in range(5):
        begin = time.monotonic()
        job_id = bench.submit(steps=1)
        bench.until_status(job_id, "running", "succeeded")
        waits.append(time.monotonic() - begin)
        bench.until_status(job_id, "succeeded")
    job_id = bench.submit(steps=200, step_seconds=0.1, checkpoint_every=50)
    bench.until_step(job_id, 1)
    before, begin = cpu_seconds(worker), time.monotonic()
    bench.until_status(job_id, "succeeded", seconds=90)
    share = (cpu_seconds(worker) - before) / (time.monotonic() - begin)
    lags = [event.created_at - event.data["said_at"] for event in bench.events(job_id) if event.kind == "step"]
    figures = {
        "submit_to_running_seconds": [round(wait, 3) for wait in waits],
        "event_lag_seconds_median_max": [round(statistics.median(lags), 3), round(max(lags), 3)],
        "worker_cpu_share_at_10_steps_a_second": round(share, 4),
    }
    (tmp_path / "figures.json").write_text(json.dumps(figures))
    assert statistics.median(waits) < 2, figures
    assert statistics.median(lags) < 1, figures
    assert share < 0.03, figures
