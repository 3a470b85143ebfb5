"""A run's numbers for TensorBoard, through tensorboardX (the extra 'train'), which needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model_core.errors import ConfigError
from model_core.training.events import Event

_STEP = ("loss", "gate_loss", "grad_norm", "tokens_per_second", "data_wait_seconds", "mfu")
_EVALUATION = ("val_loss", "unfused_loss", "val_accuracy", "unfused_accuracy")


class TensorBoard:
    """A listener of events."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter  # noqa: PLC0415  an extra
        except ImportError as error:
            raise ConfigError(
                "TensorBoard's files need tensorboardX", value="it is not installed",
                allowed="tensorboardX 2.6 or newer", param="loggers",
                fix="Install the extra 'train', or take 'tensorboard' out of loggers",
            ) from error  # fmt: skip
        self._folder, self._make = folder, SummaryWriter
        self._writer: Any = None

    def __call__(self, event: Event) -> None:
        for name, value in scalars(event):
            if self._writer is None:  # not before the run's folder was found to be free
                self._writer = self._make(str(self._folder))
            self._writer.add_scalar(name, value, event.global_step)
        if self._writer is None:
            return
        if event.kind == "summary":  # the last event: without this the last figures came up to two minutes later
            self._writer.close()
            self._writer = None
        elif event.kind == "checkpoint":
            self._writer.flush()


def scalars(event: Event) -> Iterator[tuple[str, float]]:
    """Names and numbers of an event, by the names that `events.jsonl` has."""
    if event.kind == "step":
        yield from _named("train", event.data, _STEP)
        for name, rate in event.data["learning_rates"].items():
            yield f"learning_rate/{name}", rate
        for name, loss in event.data["dataset_losses"].items():
            yield f"dataset_loss/{name}", loss
        gate = event.data.get("gate")
        if gate:
            for column, mean in enumerate(gate["mean"]):
                yield f"gate/mean_{column}", mean
            yield "gate/entropy", gate["entropy"]
    elif event.kind == "evaluation":
        yield from _named("val", event.data, _EVALUATION)


def _named(prefix: str, data: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for name in names:
        if data.get(name) is not None:
            yield f"{prefix}/{name}", float(data[name])
