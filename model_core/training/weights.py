"""A model's weights with its adapters told apart: what a step's folder holds, and what is published.

In: a model, maybe with LoRA (peft's modules); out: state dicts under the names that the model has without adapters.
Adapters are saved beside the weights, so that a step's folder loads as an ordinary model and resumes exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model_core.checkpoint import LoadOptions, load_checkpoint
from model_core.errors import CheckpointMismatchError

_BASE, _ADAPTER = ".base_layer.", ".lora_"
#: Of a configuration, what no name and no shape of a tensor tells.
_WAYS = ("fusion", "encoder")


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers without adapters, by the names of a model that never had any."""
    return {name.replace(_BASE, "."): tensor for name, tensor in model.state_dict().items() if _ADAPTER not in name}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' own tensors; empty without LoRA."""
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if _ADAPTER in name}


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """`plain_state` with every adapter folded into its layer. The model itself stays as it is."""
    state = plain_state(model)
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "active_adapters"):
            weight = state[f"{name}.weight"]
            total = weight.float()
            for adapter in module.active_adapters:
                total = total + module.get_delta_weight(adapter).float()
            state[f"{name}.weight"] = total.to(weight.dtype)
    return state


@torch.no_grad()
def load_weights(model: nn.Module, folder: Path, adapters: Path | None = None) -> None:
    """Copy a folder's weights into the model, in place: the optimizer keeps its parameters.

    They go through a second model on the CPU, since transformers renames tensors as it saves and loads.

    Raises:
        CheckpointMismatchError: another way to fuse, a name or shape that the model does not have, or one that the
            folder lacks.
    """
    saved = load_checkpoint(folder, LoadOptions(device="cpu", dtype=model.dtype)).model
    now, then = ([(key, getattr(one.config, key)) for key in _WAYS] for one in (model, saved))
    if now != then:  # gated and token_gated have the same tensors
        raise CheckpointMismatchError(
            "the checkpoint is of another architecture", value=_listed(then), allowed=_listed(now),
            fix="Resume with the model and the recipe that the run began with",
        )  # fmt: skip
    own = dict(model.state_dict(keep_vars=True))
    wanted = {name: tensor for name, tensor in own.items() if _ADAPTER in name}
    plain = {name.replace(_BASE, "."): tensor for name, tensor in own.items() if _ADAPTER not in name}
    _copy(saved.state_dict(), plain)
    has_adapters = adapters is not None and adapters.is_file()
    _copy(load_file(adapters) if has_adapters else {}, wanted)


def _listed(pairs: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{key} {value}" for key, value in pairs)


def _copy(found: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    odd = sorted(found.keys() ^ targets.keys()) or [
        f"{name} {tuple(found[name].shape)}, not {tuple(target.shape)}"
        for name, target in targets.items()
        if target.shape != found[name].shape
    ]
    if odd:
        raise CheckpointMismatchError(
            "the checkpoint does not fit this model", value=f"{', '.join(odd[:3])}; {len(odd)} in all",
            allowed="every tensor of the model and its adapters in its shape, and no other",
            fix="Resume with the model and the recipe that the run began with",
        )  # fmt: skip
    for name, target in targets.items():
        target.copy_(found[name])
