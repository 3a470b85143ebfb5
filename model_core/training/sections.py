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

    name: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=300,
        description="`package.module:name` of a class or function; it is imported and called",
    )  # fmt: skip
    options: dict[str, Any] = Field(default={}, description="keyword arguments of your own for it")


class FreezeRule(Section):
    """A rule on parameter names; of all that match, the last decides."""

    pattern: str = Field(
        min_length=1, max_length=300,
        description="shell pattern (`*`, `?`, `[abc]`) on the whole name: `model.language_model.layers.3[0-9].*`",
    )  # fmt: skip
    train: bool = Field(description="whether what matches trains")
    learning_rate: Rate | None = Field(default=None, description="of what matches; null: as without the rule")

    @model_validator(mode="after")
    def _has_a_rate_where_it_trains(self) -> Self:
        if self.learning_rate is not None and not self.train:
            raise ValueError("a learning_rate where train is true: what is frozen has none")
        return self


class FreezeConfig(Section):
    """Which components train. A mode decides, flags that are given override it, rules override both.

    With neither a mode nor its own flag, DINOv2 is frozen, as in the original.
    """

    mode: TrainingMode | None = Field(
        default=None, description="as training_mode, or a stage's mode; where that is given too, it wins"
    )
    freeze_qwen_vision: bool | None = Field(
        default=None,
        description="Qwen's vision tower with its merger, frozen or not; null, here and below: as the mode has it",
    )
    freeze_dinov2: bool | None = Field(default=None, description="DINOv2; null without a mode: frozen")
    freeze_llm: bool | None = Field(default=None, description="the language model, and not the vision tower with it")
    freeze_fusion_layers: bool | None = Field(default=None, description="the gate and the output projector")
    freeze_projections: bool | None = Field(default=None, description="both encoders' projections")
    rules: tuple[FreezeRule, ...] = Field(
        default=(), max_length=256, description="on parameter names, above mode and flags"
    )

    @property
    def flags(self) -> dict[str, bool]:
        """The flags that were given."""
        return {name: getattr(self, name) for name in FREEZE_FLAGS if getattr(self, name) is not None}

    def changed(self, settings: Mapping[str, Any]) -> FreezeConfig:
        """This with some settings replaced, as `change_freeze_settings` gets them."""
        return parse_section(FreezeConfig, self.model_dump() | dict(settings), "freeze settings")


class StageConfig(Section):
    """One stage of a curriculum: a mode and/or freeze settings of its own, for some epochs."""

    mode: TrainingMode | None = Field(default=None, description="what trains in this stage")
    freeze_config: FreezeConfig | None = Field(
        default=None, description="flags and rules of this stage; null: the run's, unless the stage has a mode"
    )
    epochs: int = Field(ge=1, le=100_000, description="passes over the data")
    steps: Count | None = Field(
        default=None, description="optimizer steps that end the stage, wherever its epochs would have; null: they do"
    )
    description: str = Field(default="", max_length=1000, description="for people; in the log and the summary")
    learning_rate: Rate | None = Field(default=None, description="as the run's; it wins over all of the run's rates")
    learning_rates: dict[RateGroup, Rate] = Field(default={}, description="of single groups; they win over everything")
    dataset_weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None,
        description="the whole mixture of this stage, by data sets' names: one that is not named is left out; null: "
        "the data sets' own weights",
    )
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={},
        description="of the language loss (`language`) and of auxiliary losses by name; what is not named counts once. "
        "At `language` 0 the language model is not run, and an encoder only where it trains",
    )
    reset_optimizer: bool = Field(default=False, description="forget all moments when the stage begins")


class CurriculumConfig(Section):
    """The original's `curriculum_training`."""

    enabled: bool = Field(default=False, description="whether the stages count")
    stages: tuple[StageConfig, ...] = Field(default=(), max_length=100, description="in their order")

    @model_validator(mode="after")
    def _has_stages(self) -> Self:
        if self.enabled and not self.stages:
            raise ValueError("an enabled curriculum with at least one stage")
        return self


class LossConfig(Section):
    """The gate's losses and encoder dropout."""

    diversity_loss: DiversityLoss | None = Field(
        default=None, description="the gate's loss; null: marginal_kl where the fusion strategy has a gate that learns"
    )
    prior: tuple[Annotated[float, Field(gt=0, lt=1)], ...] | None = Field(
        default=None,
        description="share of each encoder that marginal_kl draws to, summing to 1; null: the same for all",
    )
    anneal_ratio: float | None = Field(
        default=0.3, gt=0, le=1,
        description="marginal_kl has its whole weight at the first step and none after this share of all steps; null: "
        "its whole weight to the end, which alone keeps a gate open that would close",
    )  # fmt: skip
    ema_decay: float = Field(
        default=0.9, ge=0, lt=1, description="of the gate's moving averages, which the losses look back on, by step"
    )
    encoder_dropout: float | None = Field(
        default=None, ge=0, lt=1,
        description="chance in all that a picture trains with one encoder hidden; null: 0.2 in fusion_only, else 0",
    )  # fmt: skip

    @model_validator(mode="after")
    def _prior_sums_to_one(self) -> Self:
        if self.prior is not None and abs(sum(self.prior) - 1) > 1e-6:
            raise ValueError("a prior that sums to 1")
        return self


class LoraGroup(Section):
    """Low-rank adapters (2106.09685) on one component's linear layers; the layers themselves stay frozen."""

    rank: int = Field(default=16, ge=1, le=1024, description="of the two factors")
    alpha: float = Field(default=32.0, gt=0, description="the adapters count alpha / rank times")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="on what goes into the adapters")
    target_modules: tuple[str, ...] | None = Field(
        default=None, max_length=64, description="ends of linear layers' names, such as q_proj; null: all of them"
    )


class LoraConfig(Section):
    """Adapters by component; those left out train whole."""

    llm: LoraGroup | None = Field(default=None, description="of the language model; null, here and below: none")
    qwen_vision: LoraGroup | None = Field(default=None, description="of Qwen's vision tower; its merger trains whole")
    dinov2: LoraGroup | None = Field(default=None, description="of DINOv2")

    @property
    def groups(self) -> dict[str, LoraGroup]:
        found = {"llm": self.llm, "qwen_vision": self.qwen_vision, "dinov2": self.dinov2}
        return {name: group for name, group in found.items() if group is not None}


class DatasetConfig(Section):
    """One source of samples."""

    data_path: str = Field(min_length=1, description="JSON, JSON lines, zip, Parquet, or a folder of `datasets`")
    type: DatasetType = Field(
        default="conversation",
        description="vqa and medical_vqa: every row has a picture and a question; captioning: every row has a picture; "
        "conversation: anything",
    )
    image_root: str | None = Field(default=None, description="as the run's; null: the run's")
    weight: float | None = Field(
        default=None, ge=0,
        description="its share of the samples; null in every one: an epoch is each sample once; null beside others: 1",
    )  # fmt: skip
    name: str | None = Field(
        default=None, min_length=1, max_length=200,
        description="for dataset_weights, and for losses by data set; null: the file's name without its ending",
    )  # fmt: skip


class EvaluationConfig(Section):
    """How good the model is on held-out data, while it trains."""

    every_steps: Count | None = Field(default=None, description="besides the end of each epoch; null: only there")
    num_answers: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="answers that are generated and compared with the data's; 0: losses alone",
    )
    max_tokens: int = Field(default=64, ge=1, le=8192, description="of a generated answer")
    unfused_floor: bool = Field(
        default=True,
        description="also the same with Qwen's own tokens, past the fusion, which it should not fall below",
    )


class EarlyStoppingConfig(Section):
    """Stop where the metric has not improved by min_delta over `patience` evaluations; `best` is kept."""

    metric: Literal["val_loss", "val_accuracy"] = Field(
        default="val_loss", description="what must improve; val_accuracy needs evaluation.num_answers"
    )
    patience: Count = Field(default=3, description="evaluations without a gain that end the run")
    min_delta: float = Field(default=0.0, ge=0, description="what counts as a gain is more than this")


class CheckpointConfig(Section):
    """When steps are saved, and which of them stay."""

    every_steps: Count | None = Field(
        default=None, description="besides the end of each epoch and stage; null: only there"
    )
    keep_last: Count = Field(default=2, description="newest steps that stay")
    keep_best: bool = Field(default=True, description="the best step by evaluation stays")
    keep_stage_ends: bool = Field(default=True, description="the last step of each stage stays")


class BadSampleConfig(Section):
    """What a sample that can't be used does: end the run, or step aside while the budget lasts."""

    policy: Literal["fail", "quarantine"] = Field(
        default="fail", description="fail: the run ends, naming the rows; quarantine: they step aside and are named"
    )
    max_ratio: Ratio = Field(default=0.01, description="share of all rows that may step aside")


class FailureConfig(Section):
    """A loss or gradient that is not finite: end the run with nan_loss, or leave the step out, so many in a row."""

    nan: Literal["fail", "skip"] = Field(
        default="fail",
        description="fail: it ends the run; skip: its step is left out",
    )
    max_skipped_steps: Count = Field(default=5, description="in a row; one more ends the run")


class Note(Section):
    """What a shipped scenario is for, what it costs and what should come of it; read by people."""

    purpose: str = Field(description="what it is for")
    cost: str = Field(description="memory and time that it takes")
    expected: str = Field(description="what should come of it")
