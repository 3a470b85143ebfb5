"""What a freeze table says is what changes: named tensors by hash, no other, for modes, flags, rules and tied heads."""

from __future__ import annotations

import functools
import hashlib
import itertools
from typing import Any

import pytest
import torch

from model_core.errors import ConfigError
from model_core.model import DualVisionModel
from model_core.training.config import FREEZE_FLAGS, FreezeConfig, TrainConfig
from model_core.training.events import Event
from model_core.training.freeze import MODES, resolve_freeze
from model_core.training.hooks import RunHooks
from model_core.training.optim import build_optimizer
from model_core.training.trainer import DualVisionTrainer
from tests.model_core import tiny
from tests.model_core.training.tasks import answer_loss, untied_model
from tests.model_core.training.toy import ToySource, recipe

# Said once more, by hand and by prefix, so that the table under test is not its own witness.
PREFIXES = {
    "tower": ("model.visual.patch_embed.", "model.visual.blocks."),
    "merger": ("model.visual.merger.",),
    "dinov2": ("model.dinov2.",),
    "llm": ("model.language_model.", "lm_head."),
    "projections": ("model.fusion.norms.", "model.fusion.projectors."),
    "gate": ("model.fusion.gate.",),
    "output": ("model.fusion.output_projector.",),
}
FUSION = {"projections", "gate", "output"}
TRAINS: dict[str | None, set[str]] = {
    "full": set(PREFIXES),
    "encoders_only": {"tower", "merger", "dinov2", *FUSION},
    "llm_only": {"llm"},
    "fusion_only": FUSION,
    "qwen_only": {"tower", "merger", *FUSION},
    "dinov2_only": {"dinov2", *FUSION},
    None: set(PREFIXES) - {"dinov2"},
}
FLAGS = {
    "freeze_qwen_vision": {"tower", "merger"},
    "freeze_dinov2": {"dinov2"},
    "freeze_llm": {"llm"},
    "freeze_fusion_layers": {"gate", "output"},
    "freeze_projections": {"projections"},
}
RULES: dict[str, tuple[dict[str, Any], ...]] = {
    "none": (),
    "layers": (
        {"pattern": "model.language_model.layers.1.*", "train": True, "learning_rate": 0.02},
        {"pattern": "*.bias", "train": False},
    ),
    "head": ({"pattern": "*", "train": False}, {"pattern": "lm_head.weight", "train": True}),
    "attention": (
        {"pattern": "model.visual.blocks.*.attn.*", "train": True, "learning_rate": 0.03},
        {"pattern": "model.dinov2.*", "train": False},
    ),
}
#: Of each step: pictures and answers of their own.
STEPS = ((0, (20, 30)), (1, (25, 21)), (2, (30, 40)))
SETTINGS = [
    (mode, flag, value, rules)
    for mode, (flag, value), rules in itertools.product(
        TRAINS, [("", False), *itertools.product(FREEZE_FLAGS, (True, False))], RULES
    )
]
#: Every mode, every flag both ways and every rule set by default; their whole product where time is given.
FEW = [s for s in SETTINGS if s[1:] == ("", False, "none") or (s[0] is None and s[3] == "layers")]
FEW += [("full", "", False, "head"), ("fusion_only", "", False, "layers"), ("llm_only", "", False, "attention")]
FEW += [("dinov2_only", "freeze_projections", True, "attention")]


@functools.cache
def _model(*, tied: bool) -> DualVisionModel:
    return tiny.trained_model() if tied else untied_model()


@functools.cache
def _start(*, tied: bool) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in _model(tied=tied).state_dict().items()}


def _hashes(model: DualVisionModel) -> dict[str, str]:
    return {name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest() for name, p in model.named_parameters()}


def _expected(mode: str | None, flag: str, value: bool, rules: str, *, tied: bool) -> set[str]:
    parts = set(TRAINS[mode])
    if flag:
        parts = parts - FLAGS[flag] if value else parts | FLAGS[flag]
    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part])
    names = [name for name, _ in _model(tied=tied).named_parameters()]
    chosen = {name for name in names if name.startswith(prefixes) and not name.endswith("mask_token")}
    if rules == "layers":
        chosen |= {name for name in names if ".language_model.layers.1." in name}
        chosen -= {name for name in names if name.endswith(".bias")}
    if rules == "head":
        chosen = {"model.language_model.embed_tokens.weight" if tied else "lm_head.weight"}
    if rules == "attention":
        chosen |= {name for name in names if name.startswith("model.visual.blocks.") and ".attn." in name}
        chosen -= {name for name in names if name.startswith("model.dinov2.")}
    return chosen


def _changes_what_it_says(mode: str | None, flag: str, value: bool, rules: str, *, tied: bool) -> None:
    model = _model(tied=tied)
    model.load_state_dict(_start(tied=tied))
    freeze = FreezeConfig.model_validate({"mode": mode, "rules": RULES[rules], **({flag: value} if flag else {})})
    expected = _expected(mode, flag, value, rules, tied=tied)
    if not expected:
        with pytest.raises(ConfigError, match="nothing is left"):
            resolve_freeze(model, freeze)
        return
    # An epsilon so small that even a key bias, whose gradient is rounding alone, moves.
    config = TrainConfig(learning_rate=0.01, epsilon=1e-30)
    table = resolve_freeze(model, freeze, config.stages()[0].learning_rates)
    table.apply(model)
    optimizer = build_optimizer(model, config, table)
    before = _hashes(model)
    for seed, answers in STEPS:
        answer_loss(model, tiny.pixels((1, 4, 4), (1, 4, 4), seed=seed)[0], torch.tensor(answers)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = _hashes(model)
        assert {name for name in after if after[name] != before[name]} == expected
    assert set(table.trained_names) == expected
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in expected}
    told = {{"qwen_vision": "tower", "output_projector": "output"}.get(r.component, r.component): r for r in table.rows}
    for part, prefixes in PREFIXES.items():
        trained = sum(size for name, size in sizes.items() if name.startswith(prefixes))
        assert told[part].trainable == trained, part
        assert (told[part].state == "FROZEN") == (not trained)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("mode", "flag", "value", "rules"), FEW)
def test_three_steps_change_the_named_tensors_and_no_other(
    mode: str | None, flag: str, value: bool, rules: str, tied: bool
) -> None:
    _changes_what_it_says(mode, flag, value, rules, tied=tied)


@pytest.mark.heavy
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("mode", "flag", "value", "rules"), SETTINGS)
def test_every_mode_flag_and_rule_set_changes_what_it_says(
    mode: str | None, flag: str, value: bool, rules: str, tied: bool
) -> None:
    _changes_what_it_says(mode, flag, value, rules, tied=tied)


GATE = {f"model.fusion.gate.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
OUTPUT = {"model.fusion.output_projector.weight", "model.fusion.output_projector.bias"}
NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_trainers_stages_change_the_tensors_named_here_and_no_other(tied: bool) -> None:
    """Three steps a stage: flags, then rules. A tied head is named by the embeddings that it is."""
    stages = [
        {"epochs": 3, "mode": "fusion_only", "freeze_config": {"freeze_projections": True}},
        {"epochs": 3, "freeze_config": {"rules": [*RULES["head"], {"pattern": NORM, "train": True}]}},
    ]
    head = "model.language_model.embed_tokens.weight" if tied else "lm_head.weight"
    config = recipe(curriculum_training={"enabled": True, "stages": stages}, epsilon=1e-30)
    seen: list[dict[str, str]] = []

    def listen(event: Event) -> None:
        if event.kind in ("stage", "summary"):
            seen.append(_hashes(run.model))

    source = ToySource(config, num_samples=2)
    model = tiny.trained_model() if tied else untied_model()
    hooks = RunHooks(listeners=(listen,))
    run = DualVisionTrainer(model, source, None, config, processor=tiny.processor(), hooks=hooks, write=False)
    assert run.train().position.global_step == 6
    changed = [{name for name in old if old[name] != new[name]} for old, new in itertools.pairwise(seen)]
    assert changed == [GATE | OUTPUT, {head, NORM}]


def test_frozen_parts_are_in_eval_and_lose_their_gradients() -> None:
    model = tiny.trained_model()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    resolve_freeze(model, "encoders_only").apply(model)
    assert not model.model.language_model.training
    assert model.model.visual.blocks[0].training
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())
    resolve_freeze(model, "llm_only").apply(model)
    assert not model.fusion.training, "frozen features need no new means"
    assert model.model.language_model.training


def test_a_fresh_models_second_encoder_can_not_be_silenced_for_ever() -> None:
    fresh = tiny.dual_model()
    with pytest.raises(ConfigError, match=r"projectors\.dinov2"):
        resolve_freeze(fresh, FreezeConfig(mode="fusion_only", freeze_projections=True))
    assert "stays so" in resolve_freeze(fresh, "llm_only").warnings[-1]
    assert resolve_freeze(tiny.trained_model(), FreezeConfig(mode="fusion_only", freeze_projections=True))


def test_wrong_modes_and_idle_rules_are_refused() -> None:
    model = tiny.trained_model()
    with pytest.raises(ConfigError, match="fusion_only"):
        resolve_freeze(model, "fusion")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="matches no parameter"):
        resolve_freeze(model, FreezeConfig.model_validate({"rules": [{"pattern": "llm", "train": True}]}))


def test_the_table_reads_like_the_originals() -> None:
    table = resolve_freeze(tiny.trained_model(), "dinov2_only", {**dict.fromkeys(_RATES, 1e-4), "dinov2": 2e-6})
    shown = table.render()
    assert "PARAMETER FREEZE STATUS" in shown
    row = next(line for line in shown.splitlines() if line.startswith("DINOv2"))
    assert row.split() == ["DINOv2", ":", "29,400", "total,", "29,376", "trainable", "TRAINABLE", "lr", "2e-06"]
    assert table.to_json()["rows"][0] == {
        "component": "qwen_vision", "total": 73728, "trainable": 0, "state": "FROZEN", "learning_rates": [],
    }  # fmt: skip


_RATES = ("qwen_vision", "merger", "dinov2", "llm", "projections", "gate", "output_projector", "lora")


@pytest.mark.parametrize(
    "fusion", ["gated_residual", "token_gated", "concat", "cross_attention", "interleave", "static"]
)
def test_every_strategys_parameters_have_a_component(fusion: str) -> None:
    model = tiny.trained_model(fusion)
    table = resolve_freeze(model, "fusion_only")
    assert set(table.trained_names) == {n for n, _ in model.named_parameters() if n.startswith("model.fusion.")}
    assert set(MODES) == {mode for mode in TRAINS if mode}
