"""The look at a run's first steps sees what the optimizer does not: gradients of what is frozen."""

from __future__ import annotations

import pytest
import torch

from model_core.errors import FreezeViolationError
from model_core.training.config import TrainConfig
from model_core.training.events import Event
from model_core.training.freeze import resolve_freeze
from model_core.training.hooks import RunHooks
from model_core.training.optim import build_optimizer
from model_core.training.verify import FreezeCheck
from tests.model_core import tiny
from tests.model_core.training.test_trainer import trainer
from tests.model_core.training.toy import recipe

EMBEDDINGS = "model.language_model.embed_tokens.weight"


def test_a_gradient_of_something_frozen_ends_the_run() -> None:
    """As a hook or a module of the user's may set one: the step would not use it, and the table would be a lie."""
    run = trainer(recipe(training_mode="fusion_only"), tiny.trained_model(), write=False)
    parameters = dict(run.model.named_parameters())
    frozen, before = parameters[EMBEDDINGS], {name: one.detach().clone() for name, one in parameters.items()}

    def set_one(_gradient: torch.Tensor) -> None:
        frozen.grad = torch.zeros_like(frozen)

    next(one for name, one in parameters.items() if ".fusion.gate." in name).register_hook(set_one)
    with pytest.raises(FreezeViolationError, match=f"a frozen component has a gradient. Got: {EMBEDDINGS}.") as caught:
        run.train()
    assert caught.value.allowed and caught.value.fix
    assert all(torch.equal(one, before[name]) for name, one in parameters.items()), "no step was taken"


def test_a_report_says_of_each_component_whether_it_has_a_gradient() -> None:
    told: list[Event] = []
    hooks = RunHooks(listeners=(told.append,))
    trainer(recipe(training_mode="dinov2_only"), tiny.trained_model(), write=False, hooks=hooks).train()
    reports = [event.data["rows"] for event in told if event.kind == "verified"]
    assert len(reports) == 2
    for rows in reports:
        assert {row["component"] for row in rows if row["has_gradient"]} == {
            "dinov2", "projections", "gate", "output_projector",
        }  # fmt: skip


def test_a_gradient_that_went_into_a_master_counts() -> None:
    model = tiny.trained_model().to(torch.bfloat16)
    table = resolve_freeze(model, "fusion_only")
    table.apply(model)
    optimizer = build_optimizer(model, TrainConfig(), table)
    check = FreezeCheck.begin(model, optimizer, table)
    gate = next(one for name, one in optimizer.trained.items() if ".gate." in name)
    gate.grad = torch.ones_like(gate)
    optimizer.accumulate()
    check.after_backward(optimizer)
    assert gate.grad is None and check.with_gradient == {"gate"}
