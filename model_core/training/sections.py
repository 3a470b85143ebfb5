"""The sections of a recipe, each with its defaults and limits; `config.py` puts them together.

In: JSON data, through `strict.parse_section`; out: frozen values. It knows no torch and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from model_core.training.strict import Section, parse_section

TrainingMode = Literal["full", "encoders_only", "llm_only", "fusion_only", "qwen_only", "dinov2_only"]
Component = Literal["qwen_vision", "merger", "dinov2", "llm", "projections", "gate", "output_projector"]
RateGroup = Literal["qwen_vision", "merger", "dinov2", "llm", "projections", "gate", "output_projector", "lora"]
DiversityLoss = Literal["marginal_kl", "mutual_information", "load_balance", "per_sample_entropy", "none"]
DatasetType = Literal["conversation", "vqa", "captioning", "medical_vqa"]

TRAINING_MODES: tuple[TrainingMode, ...] = get_args(TrainingMode)
COMPONENTS: tuple[Component, ...] = get_args(Component)
#: The original's flags, by their names in `freeze_config`.
FREEZE_FLAGS = ("freeze_qwen_vision", "freeze_dinov2", "freeze_llm", "freeze_fusion_layers", "freeze_projections")

#: Where a recipe names no rate. The gate reads pooled features of large norm: at the others' rate it is at 1 and 0
#: before the second encoder has learnt to say anything.
DEFAULT_LEARNING_RATES: Mapping[str, float] = {
    "qwen_vision": 2e-6,
    "merger": 2e-6,
    "dinov2": 2e-6,
    "llm": 1e-5,
    "projections": 1e-4,
    "gate": 1e-5,
    "output_projector": 1e-4,
    "lora": 1e-4,
}
#: The chance of hiding one encoder where fusion alone learns (BRAVE, 2404.07204).
FUSION_ONLY_ENCODER_DROPOUT = 0.2

Rate = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class PartConfig(Section):
    """A part of one's own: `package.module:name`, which is called with what its place in the recipe gives and with
    these options. What a name in a recipe imports runs as code: recipes from strangers are to be read first."""

    name: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=300)
    options: dict[str, Any] = {}


class FreezeRule(Section):
    """A rule on parameter names; of all that match, the last decides.

    pattern: a shell pattern (`*`, `?`, `[abc]`) on the whole name: `model.language_model.layers.3[0-9].*`.
    """

    pattern: str = Field(min_length=1, max_length=300)
    train: bool
    learning_rate: Rate | None = None


class FreezeConfig(Section):
    """Which components train. A mode decides, flags that are given override it, rules override both.

    With neither a mode nor its own flag, DINOv2 is frozen, as in the original.
    """

    mode: TrainingMode | None = None
    freeze_qwen_vision: bool | None = None
    freeze_dinov2: bool | None = None
    freeze_llm: bool | None = None
    freeze_fusion_layers: bool | None = None
    freeze_projections: bool | None = None
    rules: tuple[FreezeRule, ...] = Field(default=(), max_length=256)

    @property
    def flags(self) -> dict[str, bool]:
        """The flags that were given."""
        return {name: getattr(self, name) for name in FREEZE_FLAGS if getattr(self, name) is not None}

    def changed(self, settings: Mapping[str, Any]) -> FreezeConfig:
        """This with some settings replaced, as `change_freeze_settings` gets them."""
        return parse_section(FreezeConfig, self.model_dump() | dict(settings), "freeze settings")


class StageConfig(Section):
    """One stage of a curriculum: a mode and/or freeze settings of its own, for some epochs.

    dataset_weights: the whole mixture of this stage, by data sets' names; those not named are left out of it.
    steps: the stage ends after so many optimizer steps, wherever its epochs would have.
    loss_weights: of the language loss (`language`) and of the auxiliary losses by name; those not named count once.
        Without the language loss the language model is not run, and an encoder only where it trains.
    """

    mode: TrainingMode | None = None
    freeze_config: FreezeConfig | None = None
    epochs: int = Field(ge=1, le=100_000)
    steps: Count | None = None
    description: str = Field(default="", max_length=1000)
    learning_rate: Rate | None = None
    learning_rates: dict[RateGroup, Rate] = {}
    dataset_weights: dict[str, Annotated[float, Field(ge=0)]] | None = None
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    reset_optimizer: bool = False


class CurriculumConfig(Section):
    """The original's `curriculum_training`."""

    enabled: bool = False
    stages: tuple[StageConfig, ...] = Field(default=(), max_length=100)

    @model_validator(mode="after")
    def _has_stages(self) -> Self:
        if self.enabled and not self.stages:
            raise ValueError("an enabled curriculum with at least one stage")
        return self


class LossConfig(Section):
    """The gate's losses and encoder dropout.

    diversity_loss: None is marginal_kl where the fusion strategy has a gate that learns.
    prior: the share of each encoder that marginal_kl draws to; None is the same for all.
    anneal_ratio: marginal_kl is at full weight at the first step and gone after this share of all steps; None: never.
    encoder_dropout: total chance that an image trains with one encoder hidden; None: 0.2 in fusion_only, else 0.
    """

    diversity_loss: DiversityLoss | None = None
    prior: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = None
    anneal_ratio: float | None = Field(default=0.3, gt=0, le=1)
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    encoder_dropout: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _prior_sums_to_one(self) -> Self:
        if self.prior is not None and abs(sum(self.prior) - 1) > 1e-6:
            raise ValueError("a prior that sums to 1")
        return self


class LoraGroup(Section):
    """Low-rank adapters (2106.09685) on one component's linear layers; the layers themselves stay frozen."""

    rank: int = Field(default=16, ge=1, le=1024)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | None = Field(default=None, max_length=64)


class LoraConfig(Section):
    """Adapters by component; those left out train whole."""

    llm: LoraGroup | None = None
    qwen_vision: LoraGroup | None = None
    dinov2: LoraGroup | None = None

    @property
    def groups(self) -> dict[str, LoraGroup]:
        found = {"llm": self.llm, "qwen_vision": self.qwen_vision, "dinov2": self.dinov2}
        return {name: group for name, group in found.items() if group is not None}


class DatasetConfig(Section):
    """One source of samples.

    name: for dataset_weights and per-dataset losses; None is the file's stem.
    weight: its share of the samples. With None in every source, an epoch is each sample once; beside others, None is 1.
    """

    data_path: str = Field(min_length=1)
    type: DatasetType = "conversation"
    image_root: str | None = None
    weight: float | None = Field(default=None, ge=0)
    name: str | None = Field(default=None, min_length=1, max_length=200)


class EvaluationConfig(Section):
    """every_steps: besides the end of each epoch. num_answers: how many are generated; 0 none."""

    every_steps: Count | None = None
    num_answers: int = Field(default=0, ge=0, le=100_000)
    max_tokens: int = Field(default=64, ge=1, le=8192)
    unfused_floor: bool = True


class EarlyStoppingConfig(Section):
    """Stop where the metric has not improved by min_delta over `patience` evaluations; `best` is kept."""

    metric: Literal["val_loss", "val_accuracy"] = "val_loss"
    patience: Count = 3
    min_delta: float = Field(default=0.0, ge=0)


class CheckpointConfig(Section):
    """every_steps: besides each epoch's and stage's end."""

    every_steps: Count | None = None
    keep_last: Count = 2
    keep_best: bool = True
    keep_stage_ends: bool = True


class BadSampleConfig(Section):
    """What a sample that can't be used does: end the run, or step aside while the budget lasts."""

    policy: Literal["fail", "quarantine"] = "fail"
    max_ratio: Ratio = 0.01


class FailureConfig(Section):
    """A loss or gradient that is not finite: end the run with nan_loss, or leave the step out, so many in a row."""

    nan: Literal["fail", "skip"] = "fail"
    max_skipped_steps: Count = 5


class Note(Section):
    """What a shipped scenario is for, what it costs and what should come of it; read by people."""

    purpose: str
    cost: str
    expected: str
