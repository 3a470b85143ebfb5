"""Bodies of `/v1/fine_tuning/jobs`: OpenAI's, and `fusion`, which holds all that is this server's own.

Unknown fields beside `fusion` are tolerated and named in `x-dve-ignored`; inside it a key is known or refused. The
sections that a recipe has as well are the recipe's own classes. It refuses to know files, models or a running job.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from model_core.training.sections import (
    BadSampleConfig,
    DatasetType,
    EarlyStoppingConfig,
    FreezeRule,
    LoraConfig,
    LossConfig,
    Rate,
    TrainingMode,
)
from service.errors import InvalidBodyError, UnsupportedParameterError
from service.protocol.body import STRICT, TOLERANT

FileId = Annotated[str, StringConstraints(pattern=r"^file-[0-9a-zA-Z_-]{1,58}$")]
#: PostgreSQL keeps no NUL, so that none is taken anywhere.
_TEXT = r"^[^\x00]*$"
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=_TEXT)]
MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=_TEXT)]


def _or_auto(allowed: str) -> WrapValidator:
    """One error for both sides of the union."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise ValueError(f"must be 'auto' or {allowed}") from None

    return WrapValidator(check)


Epochs = Annotated[Literal["auto"] | Annotated[int, Field(ge=1, le=1000)], _or_auto("a whole number from 1 to 1000")]
BatchSize = Annotated[Literal["auto"] | Annotated[int, Field(ge=1, le=4096)], _or_auto("a whole number from 1 to 4096")]
Multiplier = Annotated[
    Literal["auto"] | Annotated[float, Field(gt=0, le=1000)], _or_auto("a number above 0, up to 1000")
]


class Hyperparameters(BaseModel):
    """n_epochs: not beside a curriculum, whose stages have them. learning_rate_multiplier: of the default rates."""

    model_config = STRICT
    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class SupervisedMethod(BaseModel):
    model_config = STRICT
    hyperparameters: Hyperparameters | None = None


class Method(BaseModel):
    """Supervised alone; the others are parsed so that they can be refused by name."""

    model_config = STRICT
    type: Literal["supervised", "dpo", "reinforcement"] = "supervised"
    supervised: SupervisedMethod | None = None
    dpo: Any = None
    reinforcement: Any = None


class FreezeFlags(BaseModel):
    model_config = STRICT
    freeze_qwen_vision: bool | None = None
    freeze_dinov2: bool | None = None
    freeze_llm: bool | None = None
    freeze_fusion_layers: bool | None = None
    freeze_projections: bool | None = None


class FreezeRequest(BaseModel):
    """What trains: a mode decides, flags override it, rules override both."""

    model_config = STRICT
    mode: TrainingMode | None = None
    flags: FreezeFlags | None = None
    rules: tuple[FreezeRule, ...] = Field(default=(), max_length=256)


class CurriculumStage(BaseModel):
    """dataset_weights: by file id."""

    model_config = STRICT
    mode: TrainingMode | None = None
    freeze: FreezeRequest | None = None
    epochs: Annotated[int, Field(ge=1, le=100_000)] = 1
    description: Annotated[str, StringConstraints(max_length=1000, pattern=_TEXT)] = ""
    learning_rate: Rate | None = None
    dataset_weights: dict[FileId, Annotated[float, Field(ge=0, le=1e6)]] | None = None


class DatasetRequest(BaseModel):
    """One file of several; `training_file` must be one of them."""

    model_config = STRICT
    file: FileId
    weight: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    type: DatasetType = "conversation"


class Resources(BaseModel):
    """num_gpus: the least that the worker must have; more than 1 are refused where the recipe is made."""

    model_config = STRICT
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_gpus: Annotated[int, Field(ge=0, le=64)] = 0


class JobFusion(BaseModel):
    """`fusion` of a job: freeze settings or a curriculum, and what else a recipe has.

    priority: higher first. resume_from: id of a checkpoint whose training goes on. dry_run: read and check, train
    nothing.
    """

    model_config = STRICT
    freeze: FreezeRequest | None = None
    curriculum: Annotated[tuple[CurriculumStage, ...], Field(min_length=1, max_length=100)] | None = None
    datasets: Annotated[tuple[DatasetRequest, ...], Field(min_length=1, max_length=64)] | None = None
    losses: LossConfig | None = None
    lora: LoraConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    bad_samples: BadSampleConfig | None = None
    resources: Resources | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    resume_from: Annotated[str, StringConstraints(pattern=r"^ftckpt_[0-9a-f]{32}$")] | None = None
    dry_run: bool = False


class CreateJobRequest(BaseModel):
    """OpenAI's body. `hyperparameters` is its older place; `method.supervised.hyperparameters` the newer one."""

    model_config = TOLERANT
    model: Annotated[str, StringConstraints(min_length=1, max_length=512, pattern=_TEXT)]
    training_file: FileId
    validation_file: FileId | None = None
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    suffix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    integrations: Any = None
    fusion: JobFusion | None = None

    def chosen_hyperparameters(self) -> Hyperparameters:
        """From either place. Raises InvalidBodyError if both are used."""
        supervised = self.method.supervised if self.method else None
        newer = supervised.hyperparameters if supervised else None
        if newer is not None and self.hyperparameters is not None:
            raise InvalidBodyError(
                "'hyperparameters' stand in two places", value="both",
                allowed="method.supervised.hyperparameters alone", fix="Move all of them there",
                param="hyperparameters",
            )  # fmt: skip
        return newer or self.hyperparameters or Hyperparameters()

    def ignored_names(self) -> list[str]:
        return sorted(self.model_extra or ())


class PatchFusion(BaseModel):
    """`PATCH /v1/fine_tuning/jobs/{id}/fusion`: what a live job may be told."""

    model_config = STRICT
    freeze: FreezeRequest


def check_supported(body: CreateJobRequest) -> None:
    """Refuses by name what this server does not do. Raises UnsupportedParameterError."""
    method = body.method or Method()
    if method.type != "supervised":
        raise UnsupportedParameterError(
            "this fine-tuning method is not supported", value=method.type, allowed="supervised",
            fix="Set it to supervised, or leave 'method' out", param="method.type",
        )  # fmt: skip
    for name in ("dpo", "reinforcement"):
        if getattr(method, name) is not None:
            raise UnsupportedParameterError(
                "this fine-tuning method is not supported", value=name, allowed="method.supervised",
                fix="Leave it out", param=f"method.{name}",
            )  # fmt: skip
    if body.integrations:
        raise UnsupportedParameterError(
            "integrations are not supported", allowed="null", fix="Leave them out; events hold the same figures",
            param="integrations",
        )  # fmt: skip
