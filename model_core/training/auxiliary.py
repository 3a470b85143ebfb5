"""Losses of one's own beside the language loss: a module that sees what a pack's forward made of it.

In: features, fused tokens and the attention of the layers it asks for, with the pack and its `targets`; out: named
losses. Its parameters train with the model's and are checkpointed beside them; no model folder ever holds them. It
decides no weight: a recipe's stages do (`loss_weights`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from model_core.errors import ConfigError
from model_core.fusion.base import FusionOutput
from model_core.plugins import load_part
from model_core.training.config import TrainConfig
from model_core.training.data.packs import PackedBatch

#: Its parameters' names begin so in the optimizer and in its file.
PREFIX = "auxiliary."
LANGUAGE = "language"


@dataclass(frozen=True, slots=True)
class PackView:
    """One pack's forward.

    features: (N, C_e) by encoder, of those that were run. fused: None where the language model was not run.
    attention: by watched layer, its query (S, H, dh) and key (S, K, dh), both rotated.
    """

    pack: PackedBatch
    features: Mapping[str, Tensor]
    fused: FusionOutput | None = None
    attention: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class AuxiliaryLoss(nn.Module):
    """Subclass it, and name it in a recipe as `package.module:Class`; it is made with (model, processor, **options).

    names: of its losses, all there may be. watched_layers: whose attention it wants to see.
    learning_rate: of its own parameters; the schedule scales it like any other.
    """

    names: tuple[str, ...] = ()
    watched_layers: tuple[int, ...] = ()
    learning_rate: float = 1e-3

    def forward(self, view: PackView) -> dict[str, Tensor]:
        """Scalars by name, each a mean over the pack; a name may be missing where there is nothing to say."""
        raise NotImplementedError

    def named(self) -> dict[str, nn.Parameter]:
        """Its parameters under the names that the optimizer and the checkpoint give them."""
        return {f"{PREFIX}{name}": parameter for name, parameter in self.named_parameters()}


def build_auxiliary(config: TrainConfig, model: nn.Module, processor: Any) -> AuxiliaryLoss | None:
    """The recipe's auxiliary loss, on the model's device, born of the recipe's seed; None where it names none.

    Raises:
        ConfigError: it can't be imported, or is something else.
    """
    part = config.auxiliary_loss
    if part is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        made = load_part(part.name, "auxiliary loss")(model, processor, **part.options)
    if not isinstance(made, AuxiliaryLoss):
        raise ConfigError(
            "this is no auxiliary loss", value=part.name, allowed=f"a subclass of {__name__}.AuxiliaryLoss",
            fix="Derive it from AuxiliaryLoss", param="auxiliary_loss.name",
        )  # fmt: skip
    return made.to(next(model.parameters()).device)


def check_loss_weights(auxiliary: AuxiliaryLoss | None, config: TrainConfig) -> None:
    """Do the stages weigh losses that there are? Raises ConfigError."""
    known = (LANGUAGE, *(auxiliary.names if auxiliary is not None else ()))
    for stage in config.stages():
        for name in stage.loss_weights:
            if name not in known:
                raise ConfigError(
                    "a stage weighs a loss that there is not", value=name, allowed=", ".join(known),
                    fix="Name one of them, or the auxiliary_loss that has it", param="curriculum_training.stages",
                )  # fmt: skip
        if auxiliary is None and stage.loss_weights.get(LANGUAGE, 1.0) == 0:
            raise ConfigError(
                "a stage without the language loss has no loss at all", value=dict(stage.loss_weights),
                allowed="a weight above 0, or an auxiliary_loss",
                fix="Raise loss_weights.language, or name an auxiliary_loss", param="curriculum_training.stages",
            )  # fmt: skip
