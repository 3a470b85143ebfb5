"""A run refuses before its first step what it could not end, and a resumed one ends where the first would have."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model_core.errors import ConfigError, StorageFullError, TrainingError
from model_core.training.context import ProcessContext
from model_core.training.data.packs import PackedBatch
from model_core.training.data.prefetch import in_order
from model_core.training.events import Event, read_events
from model_core.training.hooks import RunHooks
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.test_trainer import same, told, trainer, weights
from tests.model_core.training.toy import ToySource, recipe

#: No gain is enough: the evaluation after the first epoch is the best, and the run stops after the second.
STOPPING = {"num_epochs": 4, "early_stopping": {"patience": 1, "min_delta": 1e6}}


class KilledError(Exception):
    pass


def killed_after(config: Any, kind: str, step: int, **kwargs: Any) -> None:
    """Train until this event is told, and no further."""

    def listen(event: Event) -> None:
        if (event.kind, event.global_step) == (kind, step):
            raise KilledError

    with pytest.raises(KilledError):
        trainer(config, hooks=RunHooks(listeners=(listen,)), **kwargs).train()


def two_stages(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {"enabled": True, "stages": [{"epochs": 1} | first, {"epochs": 1} | second]}


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"mode": "full"}, {"mode": "fusion_only", "freeze_config": {
            "freeze_projections": True, "freeze_fusion_layers": True}}, "nothing is left to train"),
        ({"mode": "full"}, {"freeze_config": {"rules": [{"pattern": "llm", "train": True}]}}, "matches no parameter"),
        ({"mode": "llm_only"}, {"mode": "dinov2_only", "freeze_config": {"freeze_projections": True}}, "untrained"),
    ],
)  # fmt: skip
def test_a_later_stages_contradiction_is_told_before_the_first(
    first: dict[str, Any], second: dict[str, Any], what: str
) -> None:
    with pytest.raises(ConfigError, match=f"stage 2 of 2: .*{what}") as caught:
        trainer(recipe(curriculum_training=two_stages(first, second)), write=False)
    assert caught.value.param == "curriculum_training.stages.1" and caught.value.fix and caught.value.value


def test_what_an_earlier_stage_wakes_may_stay_frozen_in_a_later_one() -> None:
    """Alone, the second stage is refused: a fresh fusion's zeros would keep DINOv2 silent. The first one moves them."""
    second = {"mode": "dinov2_only", "freeze_config": {"freeze_projections": True}}
    with pytest.raises(ConfigError, match="untrained"):
        trainer(recipe(freeze_config={"mode": "dinov2_only", "freeze_projections": True}), write=False)
    curriculum = two_stages({"mode": "fusion_only"}, second)
    run = trainer(recipe(curriculum_training=curriculum), write=False, num_samples=4)
    assert run.train().reason == "done"
    assert run.table.freeze.freeze_projections


def test_one_of_several_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match="runs in one process") as caught:
        trainer(recipe(), context=ProcessContext(1, 2), write=False)
    assert (caught.value.value, caught.value.param) == ("world_size 2", "context")
    assert caught.value.allowed and caught.value.fix
    assert trainer(recipe(), context=ProcessContext(), write=False).curriculum.total_steps


@pytest.mark.parametrize("kind", ["early_stopping", "checkpoint", "summary"])
def test_a_run_that_was_told_to_stop_stops_after_a_resume_too(tmp_path: Path, kind: str) -> None:
    """Killed as it decides, after the epoch's step is saved, and at its very end."""
    outcomes = []
    for name in ("whole", "killed"):
        config = recipe(output_dir=str(tmp_path / name), **STOPPING)
        if name == "whole":
            run = trainer(config, evaluates=True, num_samples=4)
        else:
            killed_after(config, kind, 4, evaluates=True, num_samples=4)
            run = trainer(config, tiny.dual_model(seed=5), evaluates=True, num_samples=4)
            run.resume(tmp_path / name)
        outcomes.append(run.train())
    whole, killed = outcomes
    assert whole.reason == "early_stopping" and whole.position.global_step == 4
    assert (killed.reason, killed.position) == (whole.reason, whole.position)
    assert same(weights(tmp_path / "whole" / "final"), weights(tmp_path / "killed" / "final"))
    assert told(tmp_path / "killed") == told(tmp_path / "whole")


def test_a_metric_that_is_at_its_worst_in_the_last_step_is_no_early_stop(tmp_path: Path) -> None:
    config = recipe(output_dir=str(tmp_path), **STOPPING | {"num_epochs": 2})
    assert trainer(config, evaluates=True, num_samples=4).train().reason == "done"
    again = trainer(config, evaluates=True, num_samples=4)
    again.resume(tmp_path)
    assert again.train().reason == "done"


def test_early_stopping_without_the_best_step_is_refused() -> None:
    config = recipe(early_stopping={"patience": 1}, checkpoints={"keep_best": False})
    with pytest.raises(ConfigError, match="would not be kept") as caught:
        trainer(config, evaluates=True, write=False)
    assert caught.value.param == "checkpoints.keep_best"


def test_samples_since_the_last_word_outlive_a_kill(tmp_path: Path) -> None:
    """Steps 2 and 4 are told of; the step saved at 3 knows the samples of which nobody has heard."""
    counts = []
    for name in ("whole", "killed"):
        config = recipe(output_dir=str(tmp_path / name), log_every_steps=2, checkpoints={"every_steps": 3})
        if name == "whole":
            run = trainer(config)
        else:
            killed_after(config, "checkpoint", 3)
            run = trainer(config)
            run.resume(tmp_path / name)
        run.train()
        counts.append([e.data["dataset_samples"] for e in read_events(tmp_path / name) if e.kind == "step"])
    assert counts == [[[4], [4]]] * 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_disk_without_room_for_one_checkpoint_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    """What is asked for is what a step takes, to a tenth, of all that any stage trains, and never more."""
    curriculum = two_stages({"mode": "fusion_only"}, {"mode": "llm_only"})
    settings = {"curriculum_training": curriculum, "optimizer": optimizer}

    def run(name: str) -> DualVisionTrainer:
        return trainer(recipe(output_dir=str(tmp_path / name), **settings), num_samples=2)

    run("first").train()
    taken = sum(path.stat().st_size for path in (tmp_path / "first" / "step-2").glob("*.safetensors"))
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, int(taken * 0.9)))
    with pytest.raises(StorageFullError, match="no room for one checkpoint") as caught:
        run("second").train()
    assert caught.value.param == "output_dir" and not (tmp_path / "second").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, taken))
    assert run("second").train().reason == "done"


def test_a_second_switch_at_a_step_is_told_too(tmp_path: Path) -> None:
    """Who asked for it waits for the answer, and readers would take the first one for what trained."""
    modes, wrong = ("encoders_only", "llm_only"), {"freeze_everything": True}

    def listen(event: Event) -> None:
        if event.kind == "step" and event.global_step == 1:
            for freeze in ({"mode": modes[0]}, wrong, {"mode": modes[1]}, wrong):
                run.request_freeze(freeze)

    run = trainer(recipe(output_dir=str(tmp_path), max_steps=2), hooks=RunHooks(listeners=(listen,)))
    run.train()
    events = read_events(tmp_path)
    assert [e.data["freeze"]["mode"] for e in events if e.kind == "switched"] == list(modes)
    assert len([e for e in events if e.kind == "warning:freeze"]) == 2


def _itself(packs: list[PackedBatch]) -> list[PackedBatch]:
    return packs


class AheadSource(ToySource):
    """Its packs come through torch's worker processes."""

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[list[PackedBatch]]:
        return in_order(_itself, list(super().steps(*args, **kwargs)), 2)


def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    """torch tells of it from a signal handler, wherever the trainer is just then."""
    config = recipe(output_dir=str(tmp_path), checkpoints={"every_steps": 1})

    def listen(event: Event) -> None:
        if event.kind == "checkpoint":
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)

    hooks = RunHooks(listeners=(listen,))
    run = DualVisionTrainer(
        tiny.dual_model(), AheadSource(config, 60), None, config, processor=tiny.processor(), hooks=hooks
    )
    with pytest.raises(TrainingError, match=r"has ended before its trainer.*DataLoader worker") as caught:
        run.train()
    assert caught.value.param == "num_workers" and caught.value.allowed and caught.value.fix
    resumed = trainer(config, tiny.dual_model(seed=5), num_samples=60)
    resumed.resume(tmp_path)
    assert 1 <= resumed.position.global_step < 30


def test_other_errors_keep_their_own_words() -> None:
    class Broken(ToySource):
        def steps(self, *args: Any, **kwargs: Any) -> Iterator[list[PackedBatch]]:
            raise RuntimeError("of the source alone")

    config = recipe()
    run = DualVisionTrainer(tiny.dual_model(), Broken(config), None, config, processor=tiny.processor(), write=False)
    with pytest.raises(RuntimeError, match="of the source alone"):
        run.train()
