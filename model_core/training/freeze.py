"""Which parameters train: from a mode, flags and rules to a table of every parameter, and the model set to it.

In: a model and a FreezeConfig; out: a FreezeTable, as text and as JSON. Freezing is `requires_grad`, and `eval()` for
dropout in what is frozen. It makes no optimizer, and checks no gradient: the trainer verifies what is declared here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model_core.errors import ConfigError
from model_core.training.config import (
    COMPONENTS,
    DEFAULT_LEARNING_RATES,
    TRAINING_MODES,
    Component,
    FreezeConfig,
    FreezeRule,
    Stage,
    TrainingMode,
)

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "COMPONENTS",
    "FLAG_COMPONENTS",
    "MODES",
    "FreezeRow",
    "FreezeTable",
    "ParameterChoice",
    "component_modules",
    "component_of",
    "resolve_freeze",
    "resolve_stages",
    "trained_components",
]  # fmt: skip

_FUSION: tuple[Component, ...] = ("projections", "gate", "output_projector")
_QWEN: tuple[Component, ...] = ("qwen_vision", "merger")

#: What each mode trains; everything else is frozen. The only table of its kind.
MODES: Mapping[TrainingMode, frozenset[Component]] = {
    "full": frozenset(COMPONENTS),
    "encoders_only": frozenset((*_QWEN, "dinov2", *_FUSION)),
    "llm_only": frozenset(("llm",)),
    "fusion_only": frozenset(_FUSION),
    "qwen_only": frozenset((*_QWEN, *_FUSION)),
    "dinov2_only": frozenset(("dinov2", *_FUSION)),
}
#: What each flag freezes, or trains where it is false.
FLAG_COMPONENTS: Mapping[str, tuple[Component, ...]] = {
    "freeze_qwen_vision": _QWEN,
    "freeze_dinov2": ("dinov2",),
    "freeze_llm": ("llm",),
    "freeze_fusion_layers": ("gate", "output_projector"),
    "freeze_projections": ("projections",),
}
TITLES: Mapping[Component, str] = {
    "qwen_vision": "Qwen Vision Encoder",
    "merger": "Qwen Merger",
    "dinov2": "DINOv2",
    "llm": "Language Model",
    "projections": "Projections",
    "gate": "Gating Network",
    "output_projector": "Output Projector",
}
#: Nothing reads these: DINOv2 masks patches in its own pretraining only. They could never get a gradient.
_UNREAD = (".embeddings.mask_token",)
_ADAPTER = ".lora_"


@dataclass(frozen=True, slots=True)
class ParameterChoice:
    """One parameter: its component, whether it trains and at which rate; aliases are other names of the tensor."""

    component: Component
    train: bool
    learning_rate: float
    num_elements: int
    aliases: tuple[str, ...] = ()
    is_adapter: bool = False


@dataclass(frozen=True, slots=True)
class FreezeRow:
    """One component of the table. state: TRAINABLE, FROZEN, PARTIAL or LORA."""

    component: Component
    title: str
    total: int
    trainable: int
    state: str
    learning_rates: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FreezeTable:
    """What trains. parameters: by name, each tensor once, in the model's order."""

    freeze: FreezeConfig
    parameters: Mapping[str, ParameterChoice]
    rows: tuple[FreezeRow, ...]
    warnings: tuple[str, ...] = ()

    @property
    def trainable_components(self) -> frozenset[Component]:
        return frozenset(row.component for row in self.rows if row.trainable)

    @property
    def num_trainable(self) -> int:
        return sum(row.trainable for row in self.rows)

    @property
    def trained_names(self) -> tuple[str, ...]:
        return tuple(name for name, choice in self.parameters.items() if choice.train)

    def apply(self, model: nn.Module) -> None:
        """Set requires_grad on every parameter, train() on what trains and eval() on what does not.

        A parameter that stops training loses its gradient: a stale one would count in the clipping norm.
        """
        for name, parameter in model.named_parameters():
            is_trained = self.parameters[name].train
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.grad = None
        model.train()
        trained = self.trainable_components
        for component, module in component_modules(model):
            module.train(component in trained)
        fusion = _backbone(model).fusion
        # The carried means follow the features for as long as anything in front of the gate moves.
        fusion.training = bool(trained - {"llm"})
        fusion.dropout.train(bool(trained & set(_FUSION)))

    def to_json(self) -> dict[str, Any]:
        """For events and the checkpoint: the settings and the rows."""
        rows = [
            {
                "component": row.component, "total": row.total, "trainable": row.trainable,
                "state": row.state, "learning_rates": list(row.learning_rates),
            }
            for row in self.rows
        ]  # fmt: skip
        freeze = self.freeze.model_dump(mode="json", exclude_none=True)
        return {"freeze": freeze, "rows": rows, "warnings": list(self.warnings)}

    def render(self) -> str:
        """The original's parameter status table, with the learning rates."""
        line = "=" * 96
        rows = [
            f"{row.title:<20}: {row.total:>14,} total, {row.trainable:>14,} trainable  {row.state:<9} {_rates(row)}"
            for row in self.rows
        ]
        total = sum(row.total for row in self.rows)
        last = f"{'All':<20}: {total:>14,} total, {self.num_trainable:>14,} trainable"
        warnings = [f"warning: {text}" for text in self.warnings]
        return "\n".join([line, "PARAMETER FREEZE STATUS", line, *(r.rstrip() for r in rows), last, line, *warnings])


def _rates(row: FreezeRow) -> str:
    return "lr " + ", ".join(f"{rate:g}" for rate in row.learning_rates) if row.learning_rates else ""


def component_of(name: str, second_name: str = "dinov2") -> Component:
    """The component of a parameter by its name. Fusion first: it holds projectors named like the encoders."""
    parts = name.split(".")
    if "fusion" in parts:
        if "gate" in parts:
            return "gate"
        return "output_projector" if "output_projector" in parts else "projections"
    if "visual" in parts:
        return "merger" if "merger" in parts else "qwen_vision"
    return "dinov2" if second_name in parts else "llm"


def component_modules(model: nn.Module) -> Iterator[tuple[Component, nn.Module]]:
    """The modules that make up the encoders and the language model; outer ones before those inside them."""
    backbone = _backbone(model)
    yield "qwen_vision", backbone.visual
    yield "merger", backbone.visual.merger
    yield "dinov2", backbone.second
    yield "llm", backbone.language_model
    yield "llm", model.lm_head  # type: ignore[misc]


def resolve_freeze(
    model: nn.Module,
    freeze: FreezeConfig | TrainingMode,
    learning_rates: Mapping[str, float] = DEFAULT_LEARNING_RATES,
    *,
    has_own_loss: bool = False,
    is_woken: bool = False,
) -> FreezeTable:
    """Decide for every parameter; nothing of the model is changed.

    Args:
        model: a DualVisionModel, with its adapters if it will have any.
        freeze: settings, or the name of a mode.
        learning_rates: by component and `lora`, as `Stage.learning_rates`.
        has_own_loss: an auxiliary loss may teach an encoder that the language model does not hear yet.
        is_woken: an earlier stage will have trained what keeps a fresh second encoder silent.
    Raises:
        ConfigError: an unknown mode, a rule that matches nothing, nothing left to train, or a fresh second encoder
            that could never be heard.
    """
    settings = freeze if isinstance(freeze, FreezeConfig) else FreezeConfig(mode=_checked_mode(freeze))
    components = trained_components(settings)
    second = _backbone(model).second_name
    names = _names_by_tensor(model)
    adapted = {component_of(n[0], second) for n in names.values() if _ADAPTER in n[0]}
    matched: set[FreezeRule] = set()
    choices = {}
    for parameter, (name, *aliases) in names.items():
        component = component_of(name, second)
        is_adapter = _ADAPTER in name
        train = component in components and (is_adapter or component not in adapted) and not name.endswith(_UNREAD)
        rate = learning_rates["lora" if is_adapter else component]
        for rule in settings.rules:
            if any(fnmatch.fnmatchcase(one, rule.pattern) for one in (name, *aliases)):
                matched.add(rule)
                train, rate = rule.train, rule.learning_rate or rate
        choices[name] = ParameterChoice(component, train, rate, parameter.numel(), tuple(aliases), is_adapter)
    _refuse_idle_rules(settings, matched, choices)
    warnings = [
        f"{', '.join(c.aliases)} is {name}: the two train as one"
        for name, c in choices.items()
        if c.aliases and c.train
    ]
    if not is_woken:
        warnings += _check_silence(model, choices, has_own_loss=has_own_loss)
    if not any(choice.train for choice in choices.values()):
        raise ConfigError(
            "nothing is left to train", value=settings.model_dump(exclude_defaults=True, mode="json"),
            allowed="at least one component that is not frozen", fix="Leave one of the flags out",
            param="freeze_config",
        )  # fmt: skip
    return FreezeTable(settings, choices, _rows(choices), tuple(warnings))


def resolve_stages(model: nn.Module, stages: Sequence[Stage], *, has_own_loss: bool = False) -> tuple[FreezeTable, ...]:
    """Every stage's table before the first one runs: a later stage's mistake must not cost the hours before it.

    Raises:
        ConfigError: as `resolve_freeze`, with the stage named.
    """
    tables: list[FreezeTable] = []
    silent, is_woken = _silent_names(model), False
    for stage in stages:
        try:
            table = resolve_freeze(
                model, stage.freeze, stage.learning_rates, has_own_loss=has_own_loss, is_woken=is_woken
            )
        except ConfigError as error:
            if len(stages) == 1:
                raise
            raise ConfigError(
                f"stage {stage.index + 1} of {len(stages)}: {error.what}", value=error.value, allowed=error.allowed,
                fix=error.fix, param=f"curriculum_training.stages.{stage.index}",
            ) from error  # fmt: skip
        is_woken = is_woken or any(table.parameters[name].train for name in silent)
        tables.append(table)
    return tuple(tables)


def _checked_mode(mode: str) -> TrainingMode:
    for known in TRAINING_MODES:
        if mode == known:
            return known
    raise ConfigError(
        "unknown training mode", value=mode, allowed=", ".join(TRAINING_MODES), fix="Name one of these",
        param="training_mode",
    )  # fmt: skip


def trained_components(settings: FreezeConfig) -> set[Component]:
    """What a mode and flags train, before any rule."""
    trained = set(MODES[settings.mode or "full"])
    flags = settings.flags
    if settings.mode is None:
        flags.setdefault("freeze_dinov2", True)
    for flag, is_frozen in flags.items():
        change = trained.difference_update if is_frozen else trained.update
        change(FLAG_COMPONENTS[flag])
    return trained


def _names_by_tensor(model: nn.Module) -> dict[Any, list[str]]:
    """Each parameter once, with all its names; the first is the one that `named_parameters` gives."""
    names: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _refuse_idle_rules(settings: FreezeConfig, matched: set[FreezeRule], choices: Mapping[str, Any]) -> None:
    for rule in settings.rules:
        if rule not in matched:
            like = ", ".join(list(choices)[:: max(1, len(choices) // 4)][:4])
            raise ConfigError(
                "a freeze rule matches no parameter", value=rule.pattern, allowed=f"a pattern on names such as {like}",
                fix="A pattern is for the whole name: put * where anything may stand", param="freeze_config.rules",
            )  # fmt: skip


def _check_silence(model: nn.Module, choices: Mapping[str, ParameterChoice], *, has_own_loss: bool) -> list[str]:
    """A fresh fusion whose zeros stay frozen keeps the second encoder silent for ever."""
    fusion = _backbone(model).fusion
    zeros = fusion.silent_parameters()
    # On the meta device there are shapes and no values: a cost is being estimated.
    if any(parameter.is_meta for parameter in zeros) or fusion.is_trained:
        return []
    names = _silent_names(model)
    if any(choices[name].train for name in names):
        return []
    others = sorted({c.component for c in choices.values() if c.train and c.component in ("dinov2", *_FUSION)})
    if not others or has_own_loss:
        return ["fusion is untrained and stays so in this stage: the second encoder changes no answer yet"]
    raise ConfigError(
        f"fusion is untrained, and what would let the second encoder through is frozen, so {', '.join(others)} would "
        "train for nothing",
        value=", ".join(names), allowed="these to train until fusion is trained once",
        fix="Unfreeze them (freeze_projections=false, freeze_fusion_layers=false), or train fusion_only first",
        param="freeze_config",
    )  # fmt: skip


def _silent_names(model: nn.Module) -> list[str]:
    silent = {id(parameter) for parameter in _backbone(model).fusion.silent_parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in silent]


def _rows(choices: Mapping[str, ParameterChoice]) -> tuple[FreezeRow, ...]:
    rows = []
    for component in COMPONENTS:
        mine = [choice for choice in choices.values() if choice.component == component]
        if not mine:
            continue
        trained = [choice for choice in mine if choice.train]
        readable = [c for name, c in choices.items() if c.component == component and not name.endswith(_UNREAD)]
        if not trained:
            state = "FROZEN"
        elif all(choice.is_adapter for choice in trained):
            state = "LORA"
        else:
            state = "TRAINABLE" if all(choice.train for choice in readable) else "PARTIAL"
        total, trainable = (sum(c.num_elements for c in part) for part in (mine, trained))
        rates = tuple(sorted({choice.learning_rate for choice in trained}))
        rows.append(FreezeRow(component, TITLES[component], total, trainable, state, rates))
    return tuple(rows)


def _backbone(model: Any) -> Any:
    return model.model
