"""kill -9 at any moment, and the run ends as if nothing had happened: weights, moments and events.

The run is a forked process that kills itself at a chosen call: while an event is told, a file is synced, a folder gets
its name, a link is moved.
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

EXTRA = {"checkpoints": {"every_steps": 3, "keep_last": 2}, "losses": {"encoder_dropout": 0.3}, "dropout": None}
#: (what, how often it happens before the process dies): an event, a synced file, a renamed folder or link.
MOMENTS = [("event", 13), ("fsync", 23), ("rename", 9)]


def run(folder: Path, hooks: RunHooks | None = None) -> DualVisionTrainer:
    config = recipe(curriculum_training=CURRICULUM, output_dir=str(folder), **EXTRA)
    model = tiny.dual_model()
    model.fusion.dropout.p = 0.1  # its draws must be the same after a resume
    source, val = ToySource(config, 8), ToySource(config, 4)
    return DualVisionTrainer(model, source, val, config, processor=tiny.processor(), hooks=hooks)


def killed_at(folder: Path, what: str, count: int, *, resumes: bool) -> bool:
    """Fork, train, die at the moment. False where the run ended before it came."""
    child = os.fork()
    if child == 0:
        _die_at(folder, what, count, resumes=resumes)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _die_at(folder: Path, what: str, count: int, *, resumes: bool) -> None:
    left = [count]

    def tick(*_: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tick()
            return function(*args, **kwargs)

        return call

    try:
        if what == "fsync":
            os.fsync = before(os.fsync)
        if what == "rename":
            os.rename, os.replace = before(os.rename), before(os.replace)
        trainer = run(folder, RunHooks(listeners=(tick,)) if what == "event" else None)
        if resumes:
            trainer.resume(folder)
        trainer.train()
        os._exit(0)
    finally:
        os._exit(3)  # never back into pytest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills") / "whole"
    run(folder).train()
    return folder


def check_ends_the_same(whole: Path, folder: Path) -> None:
    trainer = run(folder)
    try:
        trainer.resume(folder)
    except CheckpointIncompleteError:  # killed before the first checkpoint: there is nothing to go on with
        assert not RunFolder(folder).steps()
        for path in folder.iterdir():  # a newcomer removes what he sees; what is hidden the next run tidies
            if not path.name.startswith("."):
                path.unlink()
    trainer.train()
    assert same(weights(whole / "final"), weights(folder / "final"))
    steps, mine = RunFolder(whole).steps(), RunFolder(folder).steps()
    assert [one.step for one in steps] == [one.step for one in mine]
    assert same(load_file(steps[0].path / "optimizer.safetensors"), load_file(mine[0].path / "optimizer.safetensors"))
    assert told(folder) == told(whole)
    assert not [path for path in folder.iterdir() if path.name.endswith((".tmp", ".old"))]


@pytest.mark.parametrize(("what", "count"), MOMENTS)
def test_a_killed_run_ends_the_same(whole: Path, tmp_path: Path, what: str, count: int) -> None:
    assert killed_at(tmp_path / "run", what, count, resumes=False)
    check_ends_the_same(whole, tmp_path / "run")


@pytest.mark.heavy
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(30))
def test_a_run_killed_again_and_again_ends_the_same(whole: Path, tmp_path: Path, seed: int) -> None:
    """Up to four deaths in one run, at moments of every kind."""
    rng, folder = random.Random(seed), tmp_path / "run"
    for _ in range(rng.randint(1, 4)):
        what = rng.choice(("event", "fsync", "rename"))
        has_steps = bool(RunFolder(folder).steps())
        if not has_steps and folder.exists():
            break
        killed_at(folder, what, rng.randint(1, {"event": 30, "fsync": 90, "rename": 25}[what]), resumes=has_steps)
    check_ends_the_same(whole, folder)
