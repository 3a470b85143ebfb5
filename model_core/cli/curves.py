"""Loss and gate over a run's steps as one PNG, drawn from its events with matplotlib (the extra 'train')."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model_core.errors import ConfigError
from model_core.training.events import Event, read_events

CURVES_NAME = "curves.png"


def draw_curves(folder: Path) -> Path:
    """Draw `curves.png` into a run's folder.

    Raises:
        ConfigError: matplotlib is not installed, or the run has told of no step.
    """
    steps = [event for event in read_events(folder) if event.kind == "step"]
    evaluations = [event for event in read_events(folder) if event.kind == "evaluation"]
    if not steps:
        raise ConfigError("there are no steps to draw", value=str(folder), allowed="a run with events of its steps")
    figure, (losses, gate) = _axes()
    losses.plot([e.global_step for e in steps], [e.data["loss"] for e in steps], label="train", linewidth=1)
    for name in ("val_loss", "unfused_loss"):
        found = [e for e in evaluations if e.data.get(name) is not None]
        if found:
            losses.plot([e.global_step for e in found], [e.data[name] for e in found], marker="o", label=name)
    losses.set_ylabel("loss per label token")
    losses.legend()
    _draw_gate(gate, [event for event in steps if event.data.get("gate")])
    gate.set_xlabel("step")
    figure.savefig(folder / CURVES_NAME, dpi=120)
    return folder / CURVES_NAME


def _draw_gate(axis: Any, steps: list[Event]) -> None:
    axis.set_ylabel("mean gate weight")
    axis.set_ylim(0, 1)
    if not steps:
        axis.text(0.5, 0.5, "no gate", ha="center", transform=axis.transAxes)
        return
    for column in range(len(steps[0].data["gate"]["mean"])):
        means = [event.data["gate"]["mean"][column] for event in steps]
        axis.plot([event.global_step for event in steps], means, label=f"encoder {column}", linewidth=1)
    axis.legend()


def _axes() -> tuple[Any, Any]:
    try:
        # Without pyplot: no window system is asked for, and nothing is kept between two figures.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "curves need matplotlib, which is not installed", allowed="matplotlib 3.10 or newer",
            fix="Install the extra 'train', or take 'curves' out of loggers", param="loggers",
        ) from error  # fmt: skip
    figure = Figure(figsize=(8, 6), layout="constrained")
    return figure, figure.subplots(2, 1, sharex=True)
