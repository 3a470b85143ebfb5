"""What a recipe asks of evaluations is had, or refused before anything trains."""

from __future__ import annotations

from typing import Any

import pytest

from model_core.errors import ConfigError
from model_core.training.hooks import RunHooks
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.toy import ToySource, recipe


def trainer(*, evaluates: bool, hooks: RunHooks | None = None, **settings: Any) -> DualVisionTrainer:
    config = recipe(**settings)
    val = ToySource(config, 2) if evaluates else None
    return DualVisionTrainer(
        tiny.dual_model(), ToySource(config, 4), val, config, processor=tiny.processor(), hooks=hooks, write=False
    )


def test_answers_that_nothing_can_generate_are_refused() -> None:
    with pytest.raises(ConfigError, match="hooks=RunHooks") as caught:
        trainer(evaluates=True, evaluation={"num_answers": 2})
    assert caught.value.param == "evaluation.num_answers"
    hooks = RunHooks(answer=lambda asked, _arm, _tokens: ["a"] * len(asked))
    found = trainer(evaluates=True, hooks=hooks, evaluation={"num_answers": 2}).evaluate()
    assert found.num_answers == 2


def test_evaluations_of_nothing_are_refused_and_defaults_are_not() -> None:
    with pytest.raises(ConfigError, match="evaluations need held-out data"):
        trainer(evaluates=False, evaluation={"every_steps": 2})
    with pytest.raises(ConfigError, match="early stopping needs held-out data"):
        trainer(evaluates=False, early_stopping={"patience": 2})
    with pytest.raises(ConfigError, match="no held-out data to evaluate on"):
        trainer(evaluates=False).evaluate()
    stopping = trainer(evaluates=True, early_stopping={"patience": 2})
    assert stopping.evaluator is not None and not stopping.evaluator.can_answer
