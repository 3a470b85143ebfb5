"""What becomes of the gate in runs of the trainer, under the losses that a recipe has without a word about them.

Rates are raised, since a test's steps are few; the gate's, a tenth of the others' by default, is said beside them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from model_core.training.config import DEFAULT_LEARNING_RATES, TrainConfig
from model_core.training.losses import DEFAULT_DIVERSITY_LOSS_WEIGHT
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.toy import recipe
from tests.model_core.training.two_frames import TwoFrames, blind_to_first_frames, said

HELD_OUT = range(100_000, 100_096)


def trainer(config: TrainConfig, num_steps: int, **task: Any) -> DualVisionTrainer:
    """A fresh pair on pictures whose two frames each encoder sees one of."""
    train = TwoFrames(config, num_steps * config.batch_size, **task)
    held_out = TwoFrames(config, len(HELD_OUT), first=HELD_OUT.start, **task)
    model = blind_to_first_frames(tiny.dual_model(seed=config.seed))
    return DualVisionTrainer(model, train, held_out, config, processor=tiny.processor(), write=False)


def rates(rate: float, *, gate: float) -> dict[str, float]:
    """One for every group but the gate, whose own is so many times that."""
    return dict.fromkeys(DEFAULT_LEARNING_RATES, rate) | {"gate": gate * rate}


@pytest.mark.parametrize(("gate", "least"), [(1.0, 0.7), pytest.param(0.1, 0.51, marks=pytest.mark.heavy)])
def test_fusion_alone_learns_a_task_that_dinov2_alone_can_see(gate: float, least: float) -> None:
    """Encoders and language model are frozen, Qwen's tower sees noise. Against marginal_kl in the first 30 % of steps,
    with an encoder hidden in a fifth of the pictures, the gate turns to DINOv2: at the others' rate as far as 0.8; at a
    tenth of it the answers are learnt before the gate has moved far."""
    settings = {"learning_rate": None, "learning_rates": rates(1e-3, gate=gate)}
    config = recipe(training_mode="fusion_only", batch_size=12, seed=0, **settings)
    run = trainer(config, 120)
    assert (run.gate_loss.name, run.gate_loss.weight) == ("marginal_kl", DEFAULT_DIVERSITY_LOSS_WEIGHT)
    assert (config.losses.anneal_ratio, config.stages()[0].encoder_dropout) == (0.3, 0.2)
    pack = run.evaluator.source.pack(HELD_OUT)
    assert float(said(run.model, pack).float().mean()) < 0.4, "one answer in four at best"
    assert run.evaluate().gate["mean"] == [0.5, 0.5]
    assert run.train().reason == "done"
    assert float(said(run.model, pack).float().mean()) > 0.95
    assert run.evaluate().gate["mean"][1] > least
    with torch.no_grad():
        alone = run.forward(pack, arm="qwen-only").losses
    assert float((alone < math.log(2)).float().mean()) < 0.6, "it was DINOv2 that told"


@functools.cache
def gate_after(name: str, anneal_ratio: float | None, seed: int, weight: float | None = None) -> dict[str, Any]:
    """A gate on held-out pictures after 200 steps of `dinov2_only`, in which Qwen's frame tells nine answers of ten
    from the start, and DINOv2 has to learn to tell the tenth, under much noise. All learn at one rate, the gate too: at
    the tenth that it has by default it goes the same way, more slowly."""
    settings = {"learning_rate": None, "learning_rates": rates(2e-3, gate=1.0), "diversity_loss_weight": weight}
    losses = {"diversity_loss": name, "anneal_ratio": anneal_ratio}
    config = recipe(training_mode="dinov2_only", batch_size=16, seed=seed, losses=losses, **settings)
    assert config.stages()[0].encoder_dropout == 0, "which would be another help"
    run = trainer(config, 200, hidden=0.1, has_sign=True, grain=(20.0, 200.0))
    assert name == "none" or run.gate_loss.weight == (weight or DEFAULT_DIVERSITY_LOSS_WEIGHT)
    assert run.train().reason == "done"
    return run.evaluate().gate


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.heavy) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
def test_marginal_kl_to_the_end_avoids_the_collapse_that_none_shows(seed: int) -> None:
    """At its default weight."""
    alone = gate_after("none", None, seed)
    assert alone["gate_collapsed"] and alone["mean"][1] < 0.03
    held = gate_after("marginal_kl", None, seed)
    assert not held["gate_collapsed"] and held["mean"][1] > 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_marginal_kl_that_fades_lets_the_gate_close_again(seed: int) -> None:
    """What it is by default: losses.py and the README say so, and that `anneal_ratio` null is the way out."""
    assert TrainConfig().losses.anneal_ratio == 0.3
    fading = gate_after("marginal_kl", 0.3, seed)
    assert fading["gate_collapsed"] and fading["mean"][1] < 0.05


@pytest.mark.heavy
def test_a_tenth_of_the_default_weight_holds_no_gate() -> None:
    assert gate_after("marginal_kl", None, 0, 0.1 * DEFAULT_DIVERSITY_LOSS_WEIGHT)["gate_collapsed"]
