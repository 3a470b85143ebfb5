"""What a run says of itself in numbers: a step's figures, and the summary at the end.

In: results and where they stand; out: JSON for events and files. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from model_core.training.cost import PackShape, TowerFlops, train_flops, utilisation
from model_core.training.curriculum import Curriculum, Position
from model_core.training.data.packs import PackedBatch
from model_core.training.freeze import FreezeTable
from model_core.training.saving import RunState
from model_core.training.scores import Scores
from model_core.training.step import StepResult

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How `train` ended. reason: done, early_stopping, or requested: a checkpoint was saved and the run can go on.

    final: the result's model folder; None where nothing is written, and after a request.
    """

    reason: str
    position: Position
    metrics: Mapping[str, float]
    best: Path | None = None
    final: Path | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return self.reason != "requested"


@dataclass(frozen=True, slots=True)
class Speed:
    """seconds: of the step, its data apart. tower_flops and peak_flops_per_second: for MFU, which needs both."""

    seconds: float
    data_wait_seconds: float
    tower_flops: TowerFlops | None = None
    peak_flops_per_second: float | None = None


def timed(steps: Iterator[T], clock: Callable[[], float]) -> Iterator[tuple[T, float]]:
    """Each of them with the time that it was waited for."""
    while True:
        begin = clock()
        found = next(steps, None)
        if found is None:
            return
        yield found, clock() - begin


def step_data(
    result: StepResult, packs: Sequence[PackedBatch], speed: Speed, config: Any, table: FreezeTable
) -> dict[str, Any]:
    """A step's event. Where no clock was given, durations are 0 and rates null."""
    seconds = speed.seconds
    data = asdict(result) | {
        "seconds": seconds, "data_wait_seconds": speed.data_wait_seconds,
        "tokens_per_second": result.num_tokens / seconds if seconds else None,
    }  # fmt: skip
    if speed.tower_flops is not None and speed.peak_flops_per_second and seconds:
        shapes = [PackShape(pack.sample_lengths, pack.num_label_tokens, pack.grids) for pack in packs]
        flops = sum(train_flops(config, table, shape, speed.tower_flops) for shape in shapes)
        data["mfu"] = utilisation(flops, seconds, speed.peak_flops_per_second)
    return data


def run_summary(
    reason: str, position: Position, curriculum: Curriculum, scores: Scores, state: RunState
) -> dict[str, Any]:
    """What was trained, and the scores at the end beside those of the start and of the unfused floor. `stages` are the
    recipe's; what was switched to within them is in `switches`."""
    stages = [
        {"training_mode": stage.training_mode, "steps": steps, "description": stage.description}
        for stage, steps in zip(curriculum.stages, curriculum.steps, strict=True)
    ]
    return {
        "reason": reason, "steps": position.global_step, "trained_tokens": state.trained_tokens, "stages": stages,
        "switches": state.switches, "scores": scores.to_json(),
    }  # fmt: skip
