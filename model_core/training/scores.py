"""What a run's evaluations amount to: the start, the newest, the best, and whether it is time to stop.

In: evaluations; out: what is the best, and whether to stop. It is kept with every checkpoint and runs nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from model_core.training.config import EarlyStoppingConfig


@dataclass(slots=True)
class Scores:
    """start: before the first step; latest: of `evaluated_at`; best: of `best_step`, which the watched metric chose.

    best_value: that metric there.
    """

    start: dict[str, float] = field(default_factory=dict)
    latest: dict[str, float] = field(default_factory=dict)
    evaluated_at: int | None = None
    best_value: float | None = None
    best_step: int | None = None
    num_without_gain: int = 0
    best: dict[str, float] = field(default_factory=dict)

    def update(self, metrics: Mapping[str, float], step: int, stopping: EarlyStoppingConfig | None) -> None:
        """Take in an evaluation."""
        self.latest, self.evaluated_at = dict(metrics), step
        metric = stopping.metric if stopping is not None else "val_loss"
        min_delta = stopping.min_delta if stopping is not None else 0.0
        value = metrics[metric]
        is_better = self.best_value is None
        if self.best_value is not None:
            gain = value - self.best_value if metric == "val_accuracy" else self.best_value - value
            is_better = gain > min_delta
        if is_better:
            self.best_value, self.best_step, self.num_without_gain = value, step, 0
            self.best = dict(metrics)
        else:
            self.num_without_gain += 1

    def says_stop(self, stopping: EarlyStoppingConfig | None) -> bool:
        """Does the recipe say to stop? Read from what is kept, so that a resumed run hears the same."""
        return stopping is not None and self.num_without_gain >= stopping.patience

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
