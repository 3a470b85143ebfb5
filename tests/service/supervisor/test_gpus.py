"""Where a job runs, on GPUs that only nvidia-smi knows of: one slot each, within the memory that others leave."""

from __future__ import annotations

import pytest

from model_core.errors import ConfigError
from service.supervisor.devices import gpu_memory, parse_devices
from tests.service.supervisor.conftest import Bench

LONG = {"steps": 100_000}


def visible(bench: Bench, job_id: str) -> str:
    """What its trainer sees of the machine's GPUs."""
    bench.until_step(job_id, 1)
    return next(event.data["visible"] for event in bench.events(job_id) if event.kind == "validated")


def test_a_gpu_each_and_what_does_not_fit_waits_and_says_why(bench: Bench) -> None:
    bench.set_gpus(10, 70)
    large = bench.submit(**LONG, needs_gib=75, num_gpus=1)
    bench.worker(worker_devices="auto")

    def told() -> list[str]:
        return [event.message for event in bench.events(large) if "waits for memory" in event.message]

    bench.until(lambda: bool(told()))
    assert "needs 75.0 GiB, GPU 0 has 10.0 of 80.0 GiB free. What fits now: training_mode fusion_only" in told()[0]
    middle = bench.submit(**LONG, needs_gib=60, num_gpus=1)
    assert visible(bench, middle) == "1"
    small = bench.submit(**LONG, needs_gib=5)
    assert visible(bench, small) == "0"
    bench.cancel(middle)
    bench.set_gpus(10, 80)
    assert visible(bench, large) == "1"
    assert bench.job(large).attempt == 1, "waiting is no attempt"
    bench.cancel(large)
    bench.cancel(small)


def test_a_job_that_needs_a_gpu_is_left_by_workers_without_one(bench: Bench) -> None:
    needy = bench.submit(steps=1, num_gpus=1)
    bench.worker(worker_devices="cpu")
    other = bench.submit(steps=1)
    bench.until_status(other, "succeeded")
    assert bench.job(needy).status == "queued"
    bench.set_gpus(80)
    bench.worker(worker_devices="0")
    bench.until_status(needy, "succeeded")


def test_devices_that_nvidia_smi_knows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.set_gpus(1, 2)
    monkeypatch.setenv("PATH", str(bench.folder / "programs"), prepend=":")
    assert {index: memory.free_bytes >> 30 for index, memory in gpu_memory().items()} == {0: 1, 1: 2}
    assert [device.name for device in parse_devices("auto", 2)] == ["gpu-0", "gpu-1", "gpu-0.1", "gpu-1.1"]
    with pytest.raises(ConfigError, match=r"Got: 3\. Allowed: auto, cpu, 0, 1"):
        parse_devices("0,3", None)
