"""What a switch of the mode at run time takes along, and that a resume knows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from model_core.training import step
from model_core.training.events import Event
from model_core.training.hooks import RunHooks
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.test_trainer import same, trainer, weights
from tests.model_core.training.toy import recipe

#: After these steps of six.
SWITCHES = {1: "full", 3: "fusion_only"}
Chances = list[tuple[int, float]]


def switched(folder: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None, **settings: Any) -> Chances:
    """Train, switching on the way, and go on where it was stopped. By step, the chance that encoders were hidden at."""
    config = recipe(training_mode="fusion_only", num_epochs=2, output_dir=str(folder), **settings)
    runs: list[DualVisionTrainer] = []
    drawn: Chances = []
    draw = step.encoder_dropout

    def record(chance: float, *rest: Any) -> torch.Tensor | None:
        drawn.append((runs[-1].position.global_step + 1, chance))
        return draw(chance, *rest)

    def listen(event: Event) -> None:
        if event.kind == "step" and event.global_step in SWITCHES:
            runs[-1].switch_training_mode(SWITCHES[event.global_step])
        if event.kind == "step" and event.global_step == stop_after:
            runs[-1].request_stop()

    def begin() -> DualVisionTrainer:
        runs.append(trainer(config, tiny.trained_model(), hooks=RunHooks(listeners=(listen,)), num_samples=6))
        return runs[-1]

    with monkeypatch.context() as patch:
        patch.setattr(step, "encoder_dropout", record)
        if begin().train().reason == "requested":
            second = begin()
            second.resume(folder)
            assert second.train().reason == "done"
    assert runs[-1].position.global_step == 6
    return drawn


def test_encoder_dropout_follows_the_mode_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert switched(tmp_path, monkeypatch) == [(1, 0.2), (4, 0.2), (5, 0.2), (6, 0.2)]


def test_a_chance_of_ones_own_stays_in_every_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = switched(tmp_path, monkeypatch, losses={"encoder_dropout": 0.4})
    assert drawn == [(number, 0.4) for number in range(1, 7)]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_it_is_the_same_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int) -> None:
    """Stopped while another mode than the recipe's is in force, and while that is back by a switch."""
    whole = switched(tmp_path / "whole", monkeypatch)
    assert switched(tmp_path / "stopped", monkeypatch, stop_after) == whole
    assert same(weights(tmp_path / "whole" / "final"), weights(tmp_path / "stopped" / "final"))
