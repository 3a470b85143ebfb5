"""The recipe's `loggers` beside the log of events: TensorBoard's files while a run goes on, curves at its end.

In: a recipe; out: listeners, and a picture. What one of them lacks is told before the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model_core.errors import ConfigError
from model_core.training.config import TrainConfig
from model_core.training.curves import check_curves, draw_curves
from model_core.training.events import Listener
from model_core.training.tensorboard import TensorBoard


def build_loggers(config: TrainConfig) -> tuple[Listener, ...]:
    """Those that listen. Nothing is written before the first figure comes.

    Raises:
        ConfigError: a package is not installed, or what curves are drawn from is not written.
    """
    check_curves(config)
    return (TensorBoard(Path(config.output_dir) / "tensorboard"),) if "tensorboard" in config.loggers else ()


def finish_loggers(
    config: TrainConfig, folder: Path, encoder_names: Sequence[str], tell: Callable[[str, str, Mapping[str, Any]], None]
) -> dict[str, str]:
    """Draw the curves of a run that has ended, for its summary. The run is done and its result is there: what becomes
    of the picture is a warning."""
    if "curves" not in config.loggers:
        return {}
    try:
        return {"curves": str(draw_curves(folder, encoder_names))}
    except (ConfigError, OSError) as error:
        tell("warning:curves", f"no curves: {error}", {})
        return {}
