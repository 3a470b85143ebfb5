"""Several data sets as one, and data sets from a description, as the original's `create_dataset` has it."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from model_core.errors import ConfigError
from model_core.training.data.datasets import (
    CaptioningDataset,
    DualVisionDataset,
    MedicalVQADataset,
    Sample,
    VQADataset,
)
from model_core.training.strict import nearest
from model_core.types import ChatMessage

DATASET_TYPES: Mapping[str, type[DualVisionDataset]] = {
    "conversation": DualVisionDataset,
    "vqa": VQADataset,
    "captioning": CaptioningDataset,
    "medical_vqa": MedicalVQADataset,
}
_MULTI = "multi"


class MultiDataset:
    """Data sets behind one another; training draws from them by weight.

    Args:
        weights: of each; None is each sample once an epoch.
        temperature: above 1 evens the weights out; None is the recipe's.
    Raises:
        ConfigError: weights that don't fit, data sets of one name.
    """

    def __init__(
        self,
        datasets: Sequence[DualVisionDataset],
        weights: Sequence[float] | None = None,
        *,
        temperature: float | None = None,
    ) -> None:
        self.datasets, self.temperature = tuple(datasets), temperature
        self.weights = None if weights is None else tuple(weights)
        names = [one.name for one in self.datasets]
        if not names or len(set(names)) != len(names):
            raise ConfigError(
                "data sets need names of their own", value=", ".join(names),
                allowed="at least one, each named differently",
                fix="Give each a 'name' beside its data_path", param="datasets",
            )  # fmt: skip
        if self.weights is not None and not _are_weights(self.weights, len(names)):
            raise ConfigError(
                "the weights don't fit the data sets", value=list(self.weights),
                allowed=f"{len(names)} numbers of 0 or more, not all 0", fix="Give each data set one weight",
                param="weights",
            )  # fmt: skip
        if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
            raise ConfigError(
                "the temperature is out of range", value=temperature, allowed="above 0",
                fix="Leave it out to draw by the weights as they are", param="temperature",
            )  # fmt: skip
        self._ends = list(accumulate(len(one) for one in self.datasets))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> list[ChatMessage]:
        return self.conversation(index)

    def conversation(self, index: int) -> list[ChatMessage]:
        return list(self.sample(index).messages)

    def sample(self, index: int) -> Sample:
        local = index if index >= 0 else index + len(self)
        if not 0 <= local < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = bisect_right(self._ends, local)
        return self.datasets[place].sample(local - (self._ends[place - 1] if place else 0))


def create_dataset(config: Mapping[str, Any]) -> DualVisionDataset | MultiDataset:
    """{"type": "vqa", "args": {"data_path": ...}}, or {"type": "multi", "datasets": [...], "weights": [...]}.

    Raises:
        ConfigError: an unknown type, key or argument; what the data sets themselves raise.
    """
    kind = config.get("type") if isinstance(config, Mapping) else None
    if kind == _MULTI:
        _known(config, ("type", "datasets", "weights", "temperature"))
        described = config.get("datasets")
        if not isinstance(described, Sequence) or isinstance(described, str):
            raise ConfigError(
                "'datasets' is no list", value=repr(described), allowed="a list of descriptions",
                fix='Write "datasets": [{"type": ..., "args": {...}}, ...]', param="datasets",
            )  # fmt: skip
        parts = [create_dataset(one) for one in described]
        if nested := [one for one in parts if isinstance(one, MultiDataset)]:
            raise ConfigError(
                "a multi inside a multi", value=len(nested), allowed="data sets of one file each",
                fix="Name the inner ones' data sets in the outer one", param="datasets",
            )  # fmt: skip
        return MultiDataset(
            [one for one in parts if isinstance(one, DualVisionDataset)],
            config.get("weights"),
            temperature=config.get("temperature"),
        )
    if not isinstance(kind, str) or kind not in DATASET_TYPES:
        raise ConfigError(
            "unknown type of data set", value=repr(kind), allowed=", ".join((*DATASET_TYPES, _MULTI)), param="type",
            fix=nearest(str(kind), (*DATASET_TYPES, _MULTI), otherwise="Name one of these"),
        )  # fmt: skip
    _known(config, ("type", "args"))
    arguments = config.get("args")
    if not isinstance(arguments, Mapping) or "data_path" not in arguments:
        raise ConfigError(
            "the data set has no data_path", value=repr(arguments), allowed='"args": {"data_path": FILE}',
            fix="Name its file or folder as args.data_path", param="args.data_path",
        )  # fmt: skip
    _known(arguments, tuple(inspect.signature(DualVisionDataset).parameters))
    return DATASET_TYPES[kind](**arguments)


def _known(section: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in section:
        if key not in known:
            raise ConfigError(
                f"unknown key '{key}' of a data set", value=key, allowed=", ".join(known),
                fix=nearest(str(key), known), param=str(key),
            )  # fmt: skip


def _are_weights(weights: Sequence[Any], count: int) -> bool:
    is_finite = all(isinstance(w, (int, float)) and math.isfinite(w) and w >= 0 for w in weights)
    return len(weights) == count and is_finite and any(weights)
