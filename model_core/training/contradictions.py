"""What settings of a recipe can't stand together, though each is right alone.

In: a recipe; out: nothing, or an error with the way out. It judges no setting by itself: pydantic does (`sections.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from model_core.errors import ConfigError
from model_core.training.sections import CurriculumConfig, DatasetConfig, LossConfig, PartConfig, TrainingMode


class Recipe(Protocol):
    """What is looked at of a TrainConfig, which asks this module before it is one."""

    model: str | None
    qwen_model_name: str | None
    dinov2_model_name: str | None
    start_from: str | None
    new_model: PartConfig | None
    training_mode: TrainingMode | None
    curriculum_training: CurriculumConfig
    losses: LossConfig
    batch_source: PartConfig | None
    train_data_path: str | None
    datasets: tuple[DatasetConfig, ...]


def check_contradictions(config: Recipe) -> None:
    """Raises ConfigError: the first pair of settings that contradict each other."""
    names = [one.name or Path(one.data_path).stem for one in config.datasets]
    found = (*_contradictions(config, names), *_idle_losses(config.losses))
    for is_wrong, what, value, allowed, fix, param in found:
        if is_wrong:
            raise ConfigError(f"recipe: {what}", value=value, allowed=allowed, fix=fix, param=param)
    known = set(names) or {Path(config.train_data_path or "").stem}
    for index, stage in enumerate(config.curriculum_training.stages):
        unknown = sorted(set(stage.dataset_weights or ()) - known)
        if unknown and (config.datasets or config.train_data_path):
            raise ConfigError(
                "recipe: a stage weighs data sets that are not there", value=", ".join(unknown),
                allowed=", ".join(sorted(known)), fix="Write a data set's name, or leave it out",
                param=f"curriculum_training.stages.{index}.dataset_weights",
            )  # fmt: skip


def _contradictions(config: Recipe, names: Sequence[str]) -> Iterator[tuple[bool, str, object, str, str, str]]:
    """Of settings that are right alone: is it there, what, the value, what is allowed, the way out, the key."""
    pair = [name for name in (config.qwen_model_name, config.dinov2_model_name) if name]
    models = ", ".join(filter(None, (config.model, *pair, config.start_from)))
    files = config.train_data_path or ", ".join(names)
    yield (
        config.model is not None and bool(pair), "'model' and the two models' names both say what to load", models,
        "'model', or 'qwen_model_name' and 'dinov2_model_name', not both", "Leave one of them out", "model",
    )  # fmt: skip
    yield (
        (config.qwen_model_name is None) != (config.dinov2_model_name is None), "one of the two models is not named",
        models, "'qwen_model_name' and 'dinov2_model_name' together", "Name the other one too",
        "qwen_model_name" if config.qwen_model_name is None else "dinov2_model_name",
    )  # fmt: skip
    yield (
        bool(config.train_data_path and config.datasets), "training data is named twice",
        f"{config.train_data_path}, and as datasets {', '.join(names)}", "'train_data_path' or 'datasets', not both",
        "Leave one of them out", "datasets",
    )  # fmt: skip
    yield (
        bool(config.training_mode and config.curriculum_training.enabled),
        "a mode and the stages of a curriculum both say what trains", config.training_mode,
        "'training_mode' or an enabled 'curriculum_training', not both",
        "Leave training_mode out, or set curriculum_training.enabled to false", "training_mode",
    )  # fmt: skip
    yield (
        len(set(names)) != len(names), "data sets have the same name", ", ".join(names),
        "datasets of different names", "Give each a 'name'; without one it is the file's", "datasets",
    )  # fmt: skip
    yield (
        bool(names) and all(d.weight == 0 for d in config.datasets), "no data set has a weight", "0 for each",
        "at least one dataset with a weight above 0", "Raise one, or leave the weights out", "datasets",
    )  # fmt: skip
    yield (
        config.new_model is not None and bool(models), "a new model and one to load are named", models,
        "'new_model', or a model to load, not both", "Leave one of them out", "new_model",
    )  # fmt: skip
    yield (
        config.batch_source is not None and bool(files), "a batch source and files to train on are named", files,
        "'batch_source', or files to train on, not both", "Leave one of them out", "batch_source",
    )  # fmt: skip


def _idle_losses(losses: LossConfig) -> Iterator[tuple[bool, str, object, str, str, str]]:
    """As above: what marginal_kl alone looks at, beside another loss. A default, which a recipe that was written out in
    full has too, and null, which no other loss contradicts, ask for nothing."""
    is_other = losses.diversity_loss not in (None, "marginal_kl")
    allowed, fix = "it with diversity_loss marginal_kl", "Leave it out, or set losses.diversity_loss to marginal_kl"
    yield (
        is_other and losses.prior is not None, f"{losses.diversity_loss} draws to no prior", losses.prior, allowed, fix,
        "losses.prior",
    )  # fmt: skip
    yield (
        is_other and losses.anneal_ratio not in (None, LossConfig().anneal_ratio),
        f"{losses.diversity_loss} is not annealed", losses.anneal_ratio, allowed, fix, "losses.anneal_ratio",
    )  # fmt: skip
