"""Low-rank adapters by component (2106.09685), through peft: put in before a run, folded in when it is published.

In: a model and the recipe's `lora`; out: the same model with adapters at its linear layers. peft is imported when it is
asked for. What trains is the freeze table's business: an adapted component trains its adapters alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from model_core.errors import ConfigError
from model_core.training.config import LoraConfig, LoraGroup
from model_core.training.freeze import component_modules


def apply_lora(model: nn.Module, lora: LoraConfig, *, seed: int) -> list[str]:
    """Put the adapters in. A second call, or a model that already has some, is refused.

    Args:
        seed: of the adapters' first factors; the second are zero, so the model answers as before.
    Returns:
        names of the adapted modules.
    Raises:
        ConfigError: peft is not installed, or no linear layer of a component has the asked name.
    """
    if not lora.groups:
        return []
    peft = _peft()
    if _tuners(model, peft):
        raise ConfigError(
            "the model has adapters already", value=f"lora for {', '.join(lora.groups)}", allowed="one set",
            fix="Call merge_lora first", param="lora",
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, module in component_modules(model):
            group = lora.groups.get(component)
            if group is None or (component == "llm" and module is getattr(model, "lm_head", None)):
                continue
            config = peft.LoraConfig(
                r=group.rank,
                lora_alpha=group.alpha,
                lora_dropout=group.dropout,
                target_modules=_targets(module, component, group),
            )
            peft.inject_adapter_in_model(config, module)
    return [name for name, _ in _tuners(model, peft)]


def merge_lora(model: nn.Module) -> int:
    """Fold every adapter into its layer and take it out; the number of them. The model then answers the same."""
    peft = _peft()
    found = _tuners(model, peft)
    for name, tuner in found:
        tuner.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, tuner.get_base_layer())
    for _, module in component_modules(model):
        if hasattr(module, "peft_config"):
            del module.peft_config
    return len(found)


def _targets(module: nn.Module, component: str, group: LoraGroup) -> list[str]:
    """Full names below `module`. The merger is a component of its own, so the tower's adapters leave it alone."""
    linear = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not name.startswith("merger.")
    ]
    if group.target_modules is None:
        return linear
    chosen = [name for name in linear if name.endswith(group.target_modules)]
    idle = [want for want in group.target_modules if not any(name.endswith(want) for name in chosen)]
    if idle:
        raise ConfigError(
            f"no linear layer of {component} has this name", value=", ".join(idle),
            allowed=", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear})),
            fix="Name some of these, or leave target_modules out for all", param=f"lora.{component}.target_modules",
        )  # fmt: skip
    return chosen


def _tuners(model: nn.Module, peft: Any) -> list[tuple[str, Any]]:
    kind = peft.tuners.tuners_utils.BaseTunerLayer
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415  an optional dependency, and slow to import
    except ImportError as error:
        raise ConfigError(
            "low-rank adapters need peft", value="it is not installed", allowed="peft 0.21 or newer",
            fix="Install the extra 'train', or leave 'lora' out of the recipe", param="lora",
        ) from error  # fmt: skip
    return peft
