"""The demo's recipes as `dve demo build` runs them: a shipped scenario, scaled and placed where it was asked for.

In: a work folder, a scale, overrides; out: a TrainConfig, and what a finished run says of its duration. The run itself
is the trainer's, the same as `dve train --config`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from model_core.errors import ConfigError
from model_core.training.config import Stage, TrainConfig, parse_config
from model_core.training.events import EVENTS_NAME
from model_core.training.freeze import trained_components
from model_core.training.muon import working_dtype
from model_core.training.runs import FINAL, RunFolder
from model_core.training.strict import read_json

#: The mean of the ends of so many last stages, those that train the same parts, may be better than the last one.
NUM_ENDS = 3
#: What `make demo` runs, and what the embedded weights were made by.
RECIPES = {
    name: Path(__file__).parent / f"config_{file}.json" for name, file in (("short", "demo"), ("long", "demo_long"))
}


def demo_recipe(
    work: Path, recipe: str = "short", *, scale: float = 1.0, device: str = "auto", artwork: Path | None = None,
    overrides: Iterable[str] = (),
) -> TrainConfig:  # fmt: skip
    """One of RECIPES with its run in `work`; its products in bfloat16 where a processor is fast at them, as on a GPU.

    Raises:
        ConfigError: an override that does not fit, or a scale that is none.
    """
    data = read_json(RECIPES[recipe]) | {"output_dir": str(work), "device": device}
    if working_dtype(torch.device("cpu")) == torch.bfloat16:
        data["precision"] = "bfloat16"
    if artwork is not None:
        data["batch_source"]["options"]["artwork"] = str(artwork)
    return parse_config(scaled(data, scale) if scale != 1.0 else data, overrides)


def scaled(recipe: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The same curriculum with every stage's steps times `factor`, at least one each."""
    if not 0 < factor <= 1:
        raise ConfigError(
            "a build can't be scaled so", value=factor, allowed="above 0, up to 1", fix="Give --scale 0.1"
        )
    copy: dict[str, Any] = json.loads(json.dumps(recipe))
    per_epoch = copy["batch_source"]["options"]["steps_per_epoch"]
    for stage in copy["curriculum_training"]["stages"]:
        stage["steps"] = max(1, round(stage.get("steps", stage["epochs"] * per_epoch) * factor))
        stage["epochs"] = math.ceil(stage["steps"] / per_epoch)
    return copy


def num_steps(stage: Stage, config: TrainConfig) -> int:
    """Of a stage of scenes, which have no end."""
    per_epoch = config.batch_source.options["steps_per_epoch"] if config.batch_source else 1
    return stage.steps or stage.epochs * int(per_epoch)


def has_begun(work: Path) -> bool:
    """Is there a step to go on from?"""
    return bool(RunFolder(work).steps())  # a kill may have come before the newest one was linked


def last_ends(config: TrainConfig, work: Path) -> list[Path]:
    """Model folders of a finished run to take the mean of, the newest last: its end and, where they were kept, the ends
    of the stages before it that train the same parts."""
    stages = config.stages()
    trained = [trained_components(stage.freeze) for stage in stages]
    ends = {step.stage: step.path for step in RunFolder(work).steps() if step.reason == "stage"}
    found = [work / FINAL]
    for number in range(len(stages) - 2, len(stages) - 1 - NUM_ENDS, -1):
        if number < 0 or trained[number] != trained[-1] or number not in ends:
            break
        found.insert(0, ends[number])
    return found


def trained_minutes(work: Path) -> float:
    """Of all steps in the run's events, over all its sessions."""
    lines = (work / EVENTS_NAME).read_text(encoding="utf-8").splitlines()
    steps = [event["data"] for event in map(json.loads, lines) if event["kind"] == "step"]
    return sum(step["seconds"] + step["data_wait_seconds"] for step in steps) / 60
