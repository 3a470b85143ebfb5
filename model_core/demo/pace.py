"""How much of the demo's recipe a machine gets through in a given time: a few steps of every kind, timed.

In: a recipe, its model at birth and seconds; out: a share of its steps. Two cores of one kind take three times as long
as two of another, so a number of steps can't promise a duration. The share alone decides the weights: it is chosen once
a build, kept in its work folder, and `--scale` with the same number builds the same again, on a processor of the kind.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_core.demo.build import num_steps
from model_core.errors import ConfigError
from model_core.training.config import TrainConfig
from model_core.training.events import Event
from model_core.training.freeze import trained_components
from model_core.training.hooks import RunHooks
from model_core.training.runs import write_json
from model_core.training.strict import read_json
from model_core.training.trainer import DualVisionTrainer

_KEPT_AS = "pace.json"
#: The first steps touch memory for the first time. Even, as two processes make packs by turns.
_WARM_UP, _TIMED = 4, 8
#: A machine's other guests come and go, and checkpoints are written.
_LEEWAY = 0.95
#: Over glibc's heap steps get slower the longer a run is (DECISIONS.md, 2026-11-30), which a few steps don't show.
_LEEWAY_OF_GLIBC = 0.7
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
#: Whatever is asked, then the card's 400 questions of each kind under each arm: 250 to 300 seconds on four machines.
_LOADING_SECONDS, _SCORING_SECONDS = 30.0, 270.0


@dataclass(frozen=True, slots=True)
class Pace:
    """seconds: of a step with its pack, by what it trains. leeway: the share of a time that is counted on."""

    seconds: Mapping[frozenset[str], float]
    leeway: float = _LEEWAY

    def of_training(self, config: TrainConfig) -> float:
        """Seconds that all steps take."""
        return sum(
            num_steps(s, config) * self.seconds[frozenset(trained_components(s.freeze))] for s in config.stages()
        )

    def of_scoring(self, eval_count: int) -> float:
        return _LOADING_SECONDS + _SCORING_SECONDS * eval_count / 400

    def share(self, config: TrainConfig, seconds: float, eval_count: int) -> float:
        """Of the recipe's steps, how many fit, with the scores; at most all, and cut to four places.

        Raises:
            ConfigError: there is no time left to train in.
        """
        scoring = self.of_scoring(eval_count)
        share = math.floor(10_000 * (seconds * self.leeway - scoring) / self.of_training(config)) / 10_000
        if share <= 0:
            raise ConfigError(
                "the time is too short to train in", value=f"{seconds / 60:.1f} minutes are left",
                allowed=f"more than the {scoring / self.leeway / 60:.1f} that the scores take",
                fix="Give more --minutes or a lower --eval-count, or say --scale", param="minutes",
            )  # fmt: skip
        return min(1.0, share)


def measure(config: TrainConfig, loaded: Any, source: Any) -> Pace:
    """Trains `loaded` a few steps of every kind, on a SceneSource that nobody uses after it, and writes nothing."""
    first: dict[frozenset[str], int] = {}
    for index, stage in enumerate(config.stages()):
        first.setdefault(frozenset(trained_components(stage.freeze)), index)
    curriculum = config.curriculum_training
    stages = [curriculum.stages[i].model_copy(update={"steps": _WARM_UP + _TIMED}) for i in first.values()]
    alike = {"loggers": (), "log_every_steps": 1, "max_steps": None}
    short = config.model_copy(
        update={"curriculum_training": curriculum.model_copy(update={"stages": tuple(stages)}), **alike}
    )
    steps: list[list[float]] = [[] for _ in stages]
    waits: list[list[float]] = [[] for _ in stages]

    def listen(event: Event) -> None:
        if event.kind == "step":
            steps[event.stage].append(event.data["seconds"])
            waits[event.stage].append(event.data["data_wait_seconds"])

    source.make_one_size()
    hooks = RunHooks((listen,), time.perf_counter)
    trainer = DualVisionTrainer(loaded.model, source, None, short, processor=loaded.processor, hooks=hooks, write=False)
    try:
        trainer.train()
    finally:
        source.close()
    found = {  # somebody else's moment is not the machine's pace; every other pack was made beside the one before
        kind: statistics.median(of_steps[_WARM_UP:]) + statistics.mean(of_waits[_WARM_UP:])
        for kind, of_steps, of_waits in zip(first, steps, waits, strict=True)
    }
    is_glibc = loaded.model.device.type == "cpu" and not has_other_allocator()
    return Pace(found, _LEEWAY_OF_GLIBC if is_glibc else _LEEWAY)


def has_other_allocator(maps: Path = Path("/proc/self/maps")) -> bool:
    """Was one preloaded, as `make demo` does? Where nothing tells of it, there is no glibc either."""
    try:
        return any(name in maps.read_text(errors="replace") for name in _OTHER_ALLOCATORS)
    except OSError:
        return True


def kept_share(work: Path, recipe: str) -> float | None:
    """What a build of this recipe in this folder was begun with."""
    file = work / _KEPT_AS
    kept = read_json(file) if file.exists() else {}
    return float(kept["scale"]) if kept.get("recipe") == recipe else None


def keep_share(work: Path, recipe: str, share: float, pace: Pace) -> None:
    work.mkdir(parents=True, exist_ok=True)
    seconds = {", ".join(sorted(kind)): round(value, 4) for kind, value in pace.seconds.items()}
    write_json(work / _KEPT_AS, {"recipe": recipe, "scale": share, "seconds_per_step": seconds})
