"""The recipe of a training run: one frozen schema for the file, the command line, the HTTP body and the checkpoint.

In: JSON as the original's `config.json` has it, and overrides `a.b=c`; out: a `TrainConfig` and its stages. Unknown
keys are refused. It knows no torch, no model and no data: a recipe can be checked where none of them is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import model_validator

from model_core.errors import ConfigError
from model_core.training.contradictions import check_contradictions
from model_core.training.recipe_keys import RecipeKeys
from model_core.training.sections import (
    COMPONENTS,
    DEFAULT_LEARNING_RATES,
    FREEZE_FLAGS,
    FUSION_ONLY_ENCODER_DROPOUT,
    TRAINING_MODES,
    BadSampleConfig,
    CheckpointConfig,
    Component,
    CurriculumConfig,
    DatasetConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    FailureConfig,
    FreezeConfig,
    FreezeRule,
    LoraConfig,
    LoraGroup,
    LossConfig,
    Note,
    PartConfig,
    StageConfig,
    TrainingMode,
)
from model_core.training.strict import apply_overrides, parse_section, read_json

__all__ = [
    "COMPONENTS",
    "DEFAULT_LEARNING_RATES",
    "FREEZE_FLAGS",
    "FUSION_ONLY_ENCODER_DROPOUT",
    "TRAINING_MODES",
    "BadSampleConfig",
    "CheckpointConfig",
    "Component",
    "CurriculumConfig",
    "DatasetConfig",
    "EarlyStoppingConfig",
    "EvaluationConfig",
    "FailureConfig",
    "FreezeConfig",
    "FreezeRule",
    "LoraConfig",
    "LoraGroup",
    "LossConfig",
    "ModelSource",
    "Note",
    "PartConfig",
    "Stage",
    "StageConfig",
    "TrainConfig",
    "TrainingMode",
    "load_config",
    "parse_config",
]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage with everything resolved.

    learning_rates: by component and `lora`; a rule's own rate goes above them.
    encoder_dropout: of the stage's own mode (`TrainConfig.encoder_dropout_in`).
    steps: the most optimizer steps, where the stage names them. loss_weights: as StageConfig has them.
    """

    index: int
    training_mode: TrainingMode | None
    freeze: FreezeConfig
    epochs: int
    description: str
    learning_rate: float | None
    learning_rates: Mapping[str, float]
    dataset_weights: Mapping[str, float] | None
    reset_optimizer: bool
    encoder_dropout: float
    steps: int | None = None
    loss_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What to load: one dual checkpoint, or a pair to combine with these settings, or (neither) the demo model; or
    `new`, what makes a model that was never trained."""

    model: str | None
    pair: tuple[str, str] | None
    settings: Mapping[str, Any]
    new: PartConfig | None = None


class TrainConfig(RecipeKeys):
    """A whole run: the keys of `recipe_keys.py`, and what they mean together."""

    #: Settings that change no weight, so that a resumed run may have others.
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"note", "output_dir", "loggers", "log_every_steps", "device", "num_workers", "checkpoints"}
    )
    #: Where the command line's mode and flags go.
    FREEZE_KEYS: ClassVar[tuple[str, ...]] = ("training_mode", "freeze_config")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_contradictions(self)
        return self

    @property
    def freeze(self) -> FreezeConfig:
        """freeze_config with training_mode as its mode, which wins over a mode written inside it."""
        return self.freeze_config.changed({"mode": self.training_mode} if self.training_mode else {})

    def with_freeze(self, mode: TrainingMode | None, flags: Mapping[str, bool]) -> TrainConfig:
        """This with the command line's mode and flags. A mode given there leaves none of the file's flags standing.

        Raises:
            ConfigError: the recipe has a curriculum, or beside a mode rules of its own: they say what trains too.
        """
        if mode is None and not flags:
            return self
        if self.curriculum_training.enabled:
            raise ConfigError(
                "a curriculum's stages say what trains, and so do the flags of the command line",
                value=", ".join([*([mode] if mode else []), *flags]), allowed="one of the two",
                fix="Give --set curriculum_training.enabled=false as well", param="training_mode",
            )  # fmt: skip
        if mode is not None and self.freeze_config.rules:
            raise ConfigError(
                "the recipe's rules say what trains, and so does the command line's mode",
                value=f"{mode}, {len(self.freeze_config.rules)} rules", allowed="one of the two",
                fix=f"Give --set training_mode={mode} instead to keep the rules above the mode, or --set "
                "freeze_config.rules=[] as well to drop them", param="training_mode",
            )  # fmt: skip
        freeze = (FreezeConfig() if mode else self.freeze_config).changed(flags)
        data = self.model_dump() | {"training_mode": mode or self.training_mode, "freeze_config": freeze.model_dump()}
        return parse_section(TrainConfig, data, "recipe")

    def with_freeze_of(self, begun: Mapping[str, Any]) -> TrainConfig:
        """This with the mode and the freeze settings of a run's saved recipe, as JSON data, for going on with that run.

        Raises:
            ConfigError: they can't stand in this recipe.
        """
        said = {key: begun[key] for key in self.FREEZE_KEYS if key in begun}
        return parse_section(TrainConfig, self.model_dump() | said, "recipe")

    def require_no_evaluation(self) -> None:
        """For a run without held-out data: does the recipe count on it? What was left at its default does not.

        Raises:
            ConfigError: early stopping, or evaluations of one's own choice.
        """
        if self.early_stopping is not None:
            raise ConfigError(
                "early stopping needs held-out data", value=self.early_stopping.metric, allowed="val_data_path",
                fix="Name val_data_path (in Python, give a val_loader), or leave early_stopping out",
                param="early_stopping",
            )  # fmt: skip
        if self.evaluation != EvaluationConfig():
            raise ConfigError(
                "evaluations need held-out data", value=self.evaluation.model_dump(exclude_defaults=True),
                allowed="val_data_path, or in Python a val_loader",
                fix="Name val_data_path (in Python, give a val_loader), or leave evaluation out (--set evaluation={})",
                param="evaluation",
            )  # fmt: skip

    def stages(self) -> tuple[Stage, ...]:
        """The curriculum; one stage where there is none."""
        if not self.curriculum_training.enabled:
            only = StageConfig(epochs=self.num_epochs)
            return (self._stage(0, only, self.freeze),)
        return tuple(self._stage(i, s, self._stage_freeze(s)) for i, s in enumerate(self.curriculum_training.stages))

    def _stage_freeze(self, stage: StageConfig) -> FreezeConfig:
        # The run's flags belong to the run's mode: a stage that names a mode or flags means those alone.
        freeze = stage.freeze_config or (FreezeConfig() if stage.mode else self.freeze)
        return freeze.changed({"mode": stage.mode} if stage.mode else {})

    def _stage(self, index: int, stage: StageConfig, freeze: FreezeConfig) -> Stage:
        rates: dict[str, float] = dict(DEFAULT_LEARNING_RATES)
        for one, many in ((self.learning_rate, self.learning_rates), (stage.learning_rate, stage.learning_rates)):
            if one is not None:
                rates = dict.fromkeys(rates, one)
            rates |= {str(name): rate for name, rate in many.items()}
        return Stage(
            index=index,
            training_mode=freeze.mode,
            freeze=freeze,
            epochs=stage.epochs,
            description=stage.description,
            learning_rate=stage.learning_rate or self.learning_rate,
            learning_rates=rates,
            dataset_weights=stage.dataset_weights,
            reset_optimizer=stage.reset_optimizer,
            encoder_dropout=self.encoder_dropout_in(freeze.mode),
            steps=stage.steps,
            loss_weights=stage.loss_weights,
        )

    def encoder_dropout_in(self, mode: TrainingMode | None) -> float:
        """The chance of hiding an encoder while this mode is in force, whichever a stage began with."""
        if self.losses.encoder_dropout is not None:
            return self.losses.encoder_dropout
        return FUSION_ONLY_ENCODER_DROPOUT if mode == "fusion_only" else 0.0

    def model_source(self) -> ModelSource:
        """What to load where no model is handed in.

        Raises:
            ConfigError: settings of a new fusion beside a model that has its own already.
        """
        keys = ("encoder", "fusion", "common_dim", "dropout", "static_weights", "dinov2_max_patches")
        settings = {key: getattr(self, key) for key in keys if getattr(self, key) is not None}
        if self.qwen_model_name and self.dinov2_model_name:
            return ModelSource(None, (self.qwen_model_name, self.dinov2_model_name), settings)
        if settings:
            raise ConfigError(
                "a saved model has its own fusion; the recipe can't give it another", value=", ".join(settings),
                allowed="these settings with qwen_model_name and dinov2_model_name", fix="Leave them out",
                param=next(iter(settings)),
            )  # fmt: skip
        return ModelSource(self.model, None, {}, self.new_model)

    def train_sources(self) -> tuple[DatasetConfig, ...]:
        """Where training samples come from.

        Raises:
            ConfigError: the recipe names none.
        """
        if self.batch_source is not None:
            return ()
        if self.datasets:
            return self.datasets
        if self.train_data_path is None:
            raise ConfigError(
                "the recipe names no training data", value="neither", allowed="train_data_path or datasets",
                fix="Set train_data_path in the file, or give --set train_data_path=FILE", param="train_data_path",
            )  # fmt: skip
        return (DatasetConfig(data_path=self.train_data_path, image_root=self.image_root),)

    def fingerprint(self) -> str:
        """Of all that can change a weight; a resumed run must have the same, or say so."""
        # A key that came later is left out where nobody gives it: older runs can still be gone on with.
        left_out = {*self.HARMLESS} | ({"start_from"} if self.start_from is None else set())
        return hashlib.sha256(self.model_dump_json(exclude=left_out).encode()).hexdigest()[:16]


def parse_config(data: Any, overrides: Iterable[str] = ()) -> TrainConfig:
    """A recipe from JSON data, with `a.b=c` laid over it.

    Raises:
        ConfigError: what is wrong with it, the first thing first.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            "a recipe is not a JSON object", value=type(data).__name__, allowed="an object of settings",
            fix="Write settings as {...}; `dve configs create` shows how", param="recipe",
        )  # fmt: skip
    return parse_section(TrainConfig, apply_overrides(data, overrides), "recipe")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """A recipe from its file. Raises ConfigError as `parse_config` does."""
    return parse_config(read_json(path), overrides)
