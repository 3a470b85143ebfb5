"""kill -9 at any moment, and the run ends as if nothing had happened: weights, moments and events.

The run is a forked process that kills itself at a chosen call: while an event is told, a file is synced, a folder gets
its name, a link is moved. One run goes through a curriculum, another is stopped early.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from model_core.errors import CheckpointIncompleteError
from model_core.training.hooks import RunHooks
from model_core.training.runs import RunFolder
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.test_trainer import CURRICULUM, same, told, weights
from tests.model_core.training.toy import ToySource, recipe

LONG = {
    "curriculum_training": CURRICULUM, "checkpoints": {"every_steps": 3, "keep_last": 2},
    "losses": {"encoder_dropout": 0.3}, "dropout": None,
}  # fmt: skip
#: No gain is enough: the evaluation after the first epoch is the best, and the one after the second stops the run.
EARLY = {"num_epochs": 4, "early_stopping": {"patience": 1, "min_delta": 1e6}, "dropout": None}
#: (what, how often it happens before the process dies): an event, a synced file, a renamed folder or link; with a name,
#: a saved step of that reason, and something renamed to that.
MOMENTS = [("event", 13), ("fsync", 23), ("rename", 9), ("rename step-8", 1), ("saved stage", 1)]
EARLY_MOMENTS = [("saved epoch", 2), ("rename final", 1), ("rename summary.json", 1)]


def run(folder: Path, recipe_of: dict[str, Any], hooks: RunHooks | None = None) -> DualVisionTrainer:
    config = recipe(output_dir=str(folder), **recipe_of)
    model = tiny.dual_model()
    model.fusion.dropout.p = 0.1  # its draws must be the same after a resume
    source, val = ToySource(config, 8), ToySource(config, 4)
    return DualVisionTrainer(model, source, val, config, processor=tiny.processor(), hooks=hooks)


def killed_at(folder: Path, recipe_of: dict[str, Any], what: str, count: int, *, resumes: bool) -> bool:
    """Fork, train, die at the moment. False where the run ended before it came."""
    child = os.fork()
    if child == 0:
        _die_at(folder, recipe_of, what, count, resumes=resumes)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _die_at(folder: Path, recipe_of: dict[str, Any], what: str, count: int, *, resumes: bool) -> None:
    left, (call_of, _, name) = [count], what.partition(" ")

    def tick(*args: Any) -> None:
        if call_of == "saved" and (args[0].kind != "checkpoint" or args[0].data["reason"] != name):
            return
        if call_of == "rename" and name and Path(args[1]).name != name:
            return
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick(*args)
            return function(*args, **kwargs)

        return call

    try:
        if call_of == "fsync":
            os.fsync = before(os.fsync)
        if call_of == "rename":
            os.rename, os.replace = before(os.rename), before(os.replace)
        trainer = run(folder, recipe_of, RunHooks(listeners=(tick,)) if call_of in ("event", "saved") else None)
        if resumes:
            trainer.resume(folder)
        trainer.train()
        os._exit(0)
    finally:
        os._exit(3)  # never back into pytest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "whole"
    run(folder, LONG).train()
    return folder


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "early"
    outcome = run(folder, EARLY).train()
    assert (outcome.reason, outcome.position.global_step) == ("early_stopping", 8)
    return folder


def check_ends_the_same(whole: Path, folder: Path, recipe_of: dict[str, Any]) -> None:
    trainer = run(folder, recipe_of)
    try:
        trainer.resume(folder)
    except CheckpointIncompleteError:  # killed before the first checkpoint: it begins anew, as the error says
        assert not RunFolder(folder).steps()
    trainer.train()
    assert same(weights(whole / "final"), weights(folder / "final"))
    steps, mine = RunFolder(whole).steps(), RunFolder(folder).steps()
    assert [one.step for one in steps] == [one.step for one in mine]
    assert same(load_file(steps[0].path / "optimizer.safetensors"), load_file(mine[0].path / "optimizer.safetensors"))
    assert told(folder) == told(whole)
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))]


@pytest.mark.parametrize(("what", "count"), MOMENTS)
def test_a_killed_run_ends_the_same(whole: Path, tmp_path: Path, what: str, count: int) -> None:
    assert killed_at(tmp_path / "run", LONG, what, count, resumes=False)
    check_ends_the_same(whole, tmp_path / "run", LONG)


@pytest.mark.parametrize(("what", "count"), EARLY_MOMENTS)
def test_a_run_killed_after_it_was_told_to_stop_stops_there(early: Path, tmp_path: Path, what: str, count: int) -> None:
    assert killed_at(tmp_path / "run", EARLY, what, count, resumes=False)
    check_ends_the_same(early, tmp_path / "run", EARLY)


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(30))
def test_a_run_killed_again_and_again_ends_the_same(whole: Path, tmp_path: Path, seed: int) -> None:
    """Up to four deaths in one run, at moments of every kind."""
    rng, folder = random.Random(seed), tmp_path / "run"
    for _ in range(rng.randint(1, 4)):
        what = rng.choice(("event", "fsync", "rename"))
        has_steps = bool(RunFolder(folder).steps())
        killed_at(folder, LONG, what, rng.randint(1, {"event": 30, "fsync": 90, "rename": 25}[what]), resumes=has_steps)
    check_ends_the_same(whole, folder, LONG)
