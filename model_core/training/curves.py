"""Loss and gate over a run's steps as one PNG, drawn from its events with matplotlib (the extra 'train')."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model_core.errors import ConfigError
from model_core.training.config import TrainConfig
from model_core.training.events import Event, read_events

CURVES_NAME = "curves.png"


def check_curves(config: TrainConfig) -> None:
    """Can the curves that a recipe asks for be drawn at its end? To be asked before the run. Raises ConfigError."""
    if "curves" not in config.loggers:
        return
    if "jsonl" not in config.loggers:
        raise ConfigError(
            "curves are drawn from the run's events, which are not written", value=", ".join(config.loggers),
            allowed="'jsonl' beside 'curves'", fix="Add 'jsonl' to loggers, or take 'curves' out", param="loggers",
        )  # fmt: skip
    _figure_class()


def draw_curves(folder: Path, encoder_names: Sequence[str]) -> Path:
    """Draw `curves.png` into a run's folder. encoder_names: of the gate's columns.

    Raises:
        ConfigError: matplotlib is not installed, or the run has told of no step.
    """
    steps = [event for event in read_events(folder) if event.kind == "step"]
    evaluations = [event for event in read_events(folder) if event.kind == "evaluation"]
    if not steps:
        raise ConfigError(
            "there are no steps to draw", value=str(folder), allowed="a run with events of its steps",
            fix="Train with 'jsonl' among the loggers", param="loggers",
        )  # fmt: skip
    figure = _figure_class()(figsize=(8, 6), layout="constrained")
    losses, gate = figure.subplots(2, 1, sharex=True)
    losses.plot([e.global_step for e in steps], [e.data["loss"] for e in steps], label="train", linewidth=1)
    for name in ("val_loss", "unfused_loss"):
        found = [e for e in evaluations if e.data.get(name) is not None]
        if found:
            losses.plot([e.global_step for e in found], [e.data[name] for e in found], marker="o", label=name)
    losses.set_ylabel("loss per label token")
    losses.legend()
    _draw_gate(gate, [event for event in steps if event.data.get("gate")], encoder_names)
    gate.set_xlabel("step")
    figure.savefig(folder / CURVES_NAME, dpi=120)
    return folder / CURVES_NAME


def _draw_gate(axis: Any, steps: Sequence[Event], encoder_names: Sequence[str]) -> None:
    axis.set_ylabel("mean gate weight")
    axis.set_ylim(0, 1)
    if not steps:
        axis.text(0.5, 0.5, "no gate", ha="center", transform=axis.transAxes)
        return
    for column, name in enumerate(encoder_names):
        means = [event.data["gate"]["mean"][column] for event in steps]
        axis.plot([event.global_step for event in steps], means, label=name, linewidth=1)
    axis.legend()


def _figure_class() -> Any:
    try:
        # Without pyplot: no window system is asked for, and nothing is kept between two figures.
        from matplotlib.figure import Figure  # noqa: PLC0415  an extra, and slow to import
    except ImportError as error:
        raise ConfigError(
            "curves need matplotlib", value="it is not installed", allowed="matplotlib 3.10 or newer",
            fix="Install the extra 'train', or take 'curves' out of loggers", param="loggers",
        ) from error  # fmt: skip
    return Figure
