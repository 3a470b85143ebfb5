"""What a worker shows of training: a device's job while it runs, nobody's afterwards; samples by data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from model_core.training.config import Stage
from model_core.training.data.packs import PackedBatch
from model_core.training.events import Event
from model_core.training.hooks import RunHooks
from model_core.training.trainer import DualVisionTrainer
from service.metrics import TrainingMetrics
from tests.deploy.live import free_port
from tests.model_core import tiny
from tests.model_core.training.toy import ToySource, pack_of, recipe
from tests.service.supervisor.conftest import Bench

STEP = {"loss": 0.5, "gate_loss": 0.1, "tokens_per_second": 900.0, "learning_rates": {"gate": 1e-5}}


def test_gauges_are_a_devices_and_go_with_its_attempt() -> None:
    """They stayed for ever after a job, and two jobs overwrote each other."""
    metrics = TrainingMetrics()
    metrics.observe("gpu-0", "freeze", 0, {"rows": [{"component": "gate", "trainable": 12}]})
    metrics.observe("gpu-0", "step", 1, STEP | {"dataset_samples": [4]})
    metrics.observe("gpu-1", "step", 0, STEP | {"loss": 2.0, "dataset_samples": [1]})
    metrics.observe("gpu-0", "step", 1, {"loss": None, "dataset_samples": [4]})
    metrics.store.jobs.labels("queued").set(3)
    shown = metrics.exposition().decode()
    for line in (
        'dve_train_loss{device="gpu-0"} 0.5', 'dve_train_loss{device="gpu-1"} 2.0',
        'dve_train_diversity_loss{device="gpu-0"} 0.1', 'dve_train_stage{device="gpu-0"} 1.0',
        'dve_train_trainable_parameters{component="gate",device="gpu-0"} 12.0', 'dve_jobs{status="queued"} 3.0',
        'dve_train_learning_rate{device="gpu-0",group="gate"} 1e-05', "dve_job_heartbeat_age_seconds 0.0",
        'dve_train_samples_total{dataset="0",device="gpu-0"} 8.0',
    ):  # fmt: skip
        assert line in shown
    metrics.clear("gpu-0")
    metrics.clear("gpu-0")
    left = [line for line in metrics.exposition().decode().splitlines() if 'device="gpu-0"' in line]
    assert {line.split("{")[0] for line in left} == {"dve_train_samples_total", "dve_train_samples_created"}
    assert 'dve_train_loss{device="gpu-1"} 2.0' in metrics.exposition().decode()


def test_many_data_sets_make_few_series() -> None:
    metrics = TrainingMetrics()
    metrics.observe("cpu-0", "step", 0, {"dataset_samples": [1] * 256})
    shown = [line for line in metrics.exposition().decode().splitlines() if line.startswith("dve_train_samples_total")]
    assert len(shown) == 17 and 'dve_train_samples_total{dataset="others",device="cpu-0"} 240.0' in shown


class TwoKinds(ToySource):
    """A third of the samples are of the second data set."""

    dataset_names = ("file-a", "file-b")

    def steps(self, stage: Stage, epoch: int, *, first: int = 0) -> Iterator[list[PackedBatch]]:
        for number in range(first, self.num_steps(stage, epoch)):
            yield [pack_of([number, number + 1], dataset="file-a"), pack_of([number], dataset="file-b")]


@pytest.mark.parametrize("log_every", [1, 3])
def test_a_trainer_tells_every_sample_once(log_every: int) -> None:
    """`train_samples_total` had one series, `all`; of steps that no event tells of it would have counted none."""
    config = recipe(num_epochs=1, gradient_accumulation_steps=2, log_every_steps=log_every)
    metrics = TrainingMetrics()

    def listen(event: Event) -> None:
        metrics.observe("cpu-0", event.kind, event.stage, event.data)

    source = TwoKinds(config, 16)
    trainer = DualVisionTrainer(
        tiny.dual_model(), source, None, config, processor=tiny.processor(), hooks=RunHooks(listeners=(listen,)),
        write=False,
    )  # fmt: skip
    assert trainer.train().position.global_step == 4
    shown = metrics.exposition().decode()
    assert 'dve_train_samples_total{dataset="0",device="cpu-0"} 8.0' in shown
    assert 'dve_train_samples_total{dataset="1",device="cpu-0"} 4.0' in shown


def test_a_real_worker_shows_a_job_while_it_runs(bench: Bench, tmp_path: Path) -> None:
    port = free_port()
    job_id = bench.submit(steps=200, step_seconds=0.02)
    bench.worker(worker_metrics_port=port)
    bench.until_step(job_id, 3)

    def shown() -> dict[str, float]:
        lines = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line[0] != "#"}

    during = shown()
    assert during['dve_train_tokens_per_second{device="cpu-0"}'] == 1000.0
    assert during['dve_train_loss{device="cpu-0"}'] > 0
    bench.until_status(job_id, "succeeded")
    bench.until(lambda: not any(name.startswith("dve_train_loss") for name in shown()))
    after = shown()
    assert after['dve_train_samples_total{dataset="0",device="cpu-0"}'] == 200
    assert not [name for name in after if "device=" in name and not name.startswith("dve_train_samples")]
