"""The schedule's shape and where a step stands in a curriculum."""

from __future__ import annotations

import itertools

import pytest

from model_core.errors import ConfigError
from model_core.training.config import TrainConfig, parse_config
from model_core.training.curriculum import Curriculum, learning_rate_scale

TWO = {"curriculum_training": {"enabled": True, "stages": [{"mode": "fusion_only", "epochs": 1}] * 2}}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_then_down_to_the_least(schedule: str) -> None:
    config = parse_config({"lr_schedule": schedule, "warmup_steps": 4, "min_lr_ratio": 0.1})
    scales = [learning_rate_scale(config, step, 100) for step in range(101)]
    assert scales[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(scales) == 1.0
    assert scales[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in itertools.pairwise(scales[4:]))


def test_a_run_of_one_step_learns() -> None:
    assert learning_rate_scale(TrainConfig(warmup_steps=100), 0, 1) == 1.0


def test_the_schedule_runs_by_stage_or_once() -> None:
    by_stage = Curriculum(parse_config({**TWO, "warmup_steps": 0}), [10, 10])
    once = Curriculum(parse_config({**TWO, "warmup_steps": 0, "schedule_span": "run"}), [10, 10])
    assert by_stage.scale(1, 0) == 1.0
    assert once.scale(1, 0) == pytest.approx(0.5)
    assert once.progress(1, 5) == 0.75


def test_steps_count_on_over_stages_and_max_steps_cuts() -> None:
    curriculum = Curriculum(parse_config({**TWO, "max_steps": 13}), [10, 10])
    assert curriculum.steps == [10, 3]
    assert [curriculum.global_step(*at) for at in ((0, 0), (0, 9), (1, 0), (1, 2))] == [0, 9, 10, 12]
    with pytest.raises(ConfigError, match="at least one step"):
        Curriculum(parse_config(TWO), [10, 0])
