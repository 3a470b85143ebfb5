"""Where in a curriculum a step stands, and what follows from it: the rate's schedule and the losses' annealing.

In: a recipe and the optimizer steps of each stage; out: numbers between 0 and 1. It counts and trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model_core.errors import ConfigError
from model_core.training.config import FreezeConfig, TrainConfig

if TYPE_CHECKING:
    from model_core.training.data.packs import BatchSource


def learning_rate_scale(config: TrainConfig, step: int, total_steps: int) -> float:
    """The share of every group's rate at a step, counted from 0: warm-up to 1, then the schedule's way down.

    The last step still learns: without `min_lr_ratio`, 0 would be reached at `total_steps`.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_ratio * total_steps)
    warmup = min(warmup, max(0, total_steps - 1))
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.lr_schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    left = (1 + math.cos(math.pi * done)) / 2 if config.lr_schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * left


@dataclass(slots=True)
class Position:
    """Steps done: in this epoch, in this stage, in all. Epochs count from 0 within a stage."""

    stage: int = 0
    epoch: int = 0
    epoch_step: int = 0
    stage_step: int = 0
    global_step: int = 0

    def step_done(self) -> None:
        self.epoch_step += 1
        self.stage_step += 1
        self.global_step += 1

    def epoch_done(self) -> None:
        self.epoch, self.epoch_step = self.epoch + 1, 0

    def stage_done(self) -> None:
        self.stage += 1
        self.epoch = self.epoch_step = self.stage_step = 0


def stage_steps(config: TrainConfig, source: BatchSource) -> list[int]:
    """Optimizer steps of each stage: its epochs', or fewer where the stage says so."""
    found = []
    for stage in config.stages():
        source.prepare_stage(stage)
        steps = sum(source.num_steps(stage, epoch) for epoch in range(stage.epochs))
        found.append(steps if stage.steps is None else min(steps, stage.steps))
    return found


class Curriculum:
    """The stages with their lengths in optimizer steps. `max_steps` cuts the last ones short."""

    def __init__(self, config: TrainConfig, steps_per_stage: Sequence[int]) -> None:
        self.config, self.stages = config, config.stages()
        if len(steps_per_stage) != len(self.stages) or any(steps < 1 for steps in steps_per_stage):
            raise ConfigError(
                "every stage of a curriculum needs at least one step",
                value=list(steps_per_stage),
                allowed=f"{len(self.stages)} counts of 1 or more",
                fix="Give more data, a smaller batch_size or fewer gradient_accumulation_steps",
                param="curriculum_training.stages",
            )
        left = config.max_steps if config.max_steps is not None else sum(steps_per_stage)
        self.steps: list[int] = []
        for steps in steps_per_stage:
            self.steps.append(min(steps, left))
            left -= self.steps[-1]

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    def global_step(self, stage: int, step: int) -> int:
        """Steps done before step `step` of stage `stage`."""
        return sum(self.steps[:stage]) + step

    def scale(self, stage: int, step: int) -> float:
        """The schedule's share of the learning rates at a step of a stage."""
        if self.config.schedule_span == "run":
            return learning_rate_scale(self.config, self.global_step(stage, step), self.total_steps)
        return learning_rate_scale(self.config, step, self.steps[stage])

    def progress(self, stage: int, step: int) -> float:
        """The share of all steps that is done: what the gate's losses are annealed by."""
        return min(1.0, self.global_step(stage, step) / max(1, self.total_steps))


def is_over(freeze: FreezeConfig, position: Position) -> ConfigError:
    """A switch that would train nothing."""
    return ConfigError(
        "the run is over, so nothing would train in another mode", value=f"{position.global_step} steps are done",
        allowed="a switch before the last step", param="training_mode",
        fix=f"Make another trainer, with {freeze.mode or 'that'} as its mode and an output_dir of its own",
    )  # fmt: skip
