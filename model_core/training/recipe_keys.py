"""Every key of a recipe, with its type, its limits, its default and what it means: `RECIPES.md` is made of this.

In: JSON data, through `strict.parse_section`; out: frozen values. What keys mean together is said elsewhere
(`config.py`), and what can't stand together too (`contradictions.py`). It knows no torch and no model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from model_core.training.sections import (
    BadSampleConfig,
    CheckpointConfig,
    Count,
    CurriculumConfig,
    DatasetConfig,
    EarlyStoppingConfig,
    EvaluationConfig,
    FailureConfig,
    FreezeConfig,
    LoraConfig,
    LossConfig,
    Note,
    PartConfig,
    Rate,
    RateGroup,
    Ratio,
    TrainingMode,
)
from model_core.training.strict import Section


class RecipeKeys(Section):
    """The keys of `TrainConfig`. Their order is part of a recipe's fingerprint: a new one goes to the end of all, or is
    left out there while nobody gives it. Every key of the original's config.json has its old name and place."""

    note: Note | None = Field(default=None, description="what a shipped recipe is for; for people")
    # The model
    model: str | None = Field(
        default=None,
        description="a dual checkpoint to start from, folder or hub id, instead of the two names; without any of the "
        "three: the demo model",
    )
    qwen_model_name: str | None = Field(
        default=None, description="hub id or folder of a Qwen2.5-VL, to make a new pair of with dinov2_model_name"
    )
    dinov2_model_name: str | None = Field(
        default=None, description="hub id or folder of a DINOv2, to make a new pair of with qwen_model_name"
    )
    start_from: str | None = Field(
        default=None,
        description="a folder with weights of that model to begin with: a published version, or a step or the end of a "
        "run",
    )
    new_model: PartConfig | None = Field(
        default=None,
        description="a model that was never trained, instead of any name: called with seed=, gives it and a processor",
    )
    encoder: str | None = Field(
        default=None, description="of a new pair: the second encoder, `dinov2` or `package.module:Class`; null: dinov2"
    )
    fusion: str | None = Field(
        default=None,
        description="of a new pair: gated, gated_residual, token_gated, concat, cross_attention, interleave, static, "
        "or `package.module:Class`; null: gated",
    )
    common_dim: Count | None = Field(
        default=None,
        description="of a new pair: the width that both encoders are projected to; null: the language model's",
    )
    dropout: float | None = Field(
        default=None, ge=0, lt=1, description="of a new pair: dropout on fused tokens, in training only; null: 0"
    )
    static_weights: tuple[float, ...] | None = Field(
        default=None,
        description="of a new pair with `fusion` static: each encoder's weight, Qwen's first, summing to 1",
    )
    dinov2_max_patches: int | None = Field(
        default=None,
        ge=4,
        description="of a new pair: DINOv2 sees a larger picture shrunk to so many patches; null: 1369, of 518 x 518",
    )
    use_flash_attention: bool | None = Field(
        default=None, description="flash-attn's kernels; null: where it is installed and the device is CUDA"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, or another that this torch has")
    # What trains
    training_mode: TrainingMode | None = Field(
        default=None,
        description="what trains, where there is no curriculum; flags of freeze_config refine it; null: the flags "
        "alone, on top of everything but DINOv2",
    )
    freeze_config: FreezeConfig = Field(
        default=FreezeConfig(), description="flags and rules, without a curriculum, or for its stages that have none"
    )
    curriculum_training: CurriculumConfig = Field(
        default=CurriculumConfig(), description="stages, one behind the other, as one run that can be resumed"
    )
    lora: LoraConfig = Field(default=LoraConfig(), description="low-rank adapters instead of a component's own weights")
    # How
    learning_rate: Rate | None = Field(
        default=None,
        description="of every group that learning_rates does not name; null: each group's own default, below",
    )
    learning_rates: dict[RateGroup, Rate] = Field(
        default={}, description="of single groups; they win over learning_rate"
    )
    num_epochs: int = Field(
        default=1, ge=1, le=100_000, description="passes over the data; a curriculum's stages have their own"
    )
    max_steps: Count | None = Field(
        default=None, description="optimizer steps of the whole run at most; null: as many as the epochs make"
    )
    batch_size: int = Field(
        default=1, ge=1, le=65_536,
        description="samples of a pack at most; a step takes batch_size * gradient_accumulation_steps of them",
    )  # fmt: skip
    max_tokens: int = Field(
        default=4096, ge=16, le=1 << 20,
        description="tokens of a pack at most, those of pictures too; a longer sample can't train",
    )  # fmt: skip
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=65_536, description="packs of one optimizer step")
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="adamw, or muon for the matrices inside blocks and adamw for everything else"
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="decoupled, and of matrices alone")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.98), description="AdamW's, of both moments"
    )
    epsilon: float = Field(default=1e-8, gt=0, le=1e-2, description="AdamW's")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="norm that all gradients together are clipped to; null: never"
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the rates go down after their warm-up"
    )
    schedule_span: Literal["stage", "run"] = Field(
        default="stage", description="the schedule runs anew in each stage, or once over all"
    )
    min_lr_ratio: Ratio = Field(default=0.0, description="share of its rate that a group ends with")
    warmup_steps: int | None = Field(
        default=None, ge=0, description="steps in which the rates rise at first; null: by warmup_ratio"
    )
    warmup_ratio: Ratio = Field(default=0.03, description="the same as a share of the schedule's steps")
    rewarm_steps: int = Field(default=20, ge=0, description="warm-up of parameters that are unfrozen later than step 0")
    precision: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="what products are in; auto: bfloat16 on CUDA and where weights have 16 bits, else float32; "
        "weights that train have a float32 master in any case",
    )
    gradient_checkpointing: tuple[Literal["qwen_vision", "dinov2", "llm"], ...] = Field(
        default=(),
        description="components whose activations are computed twice, for want of memory; a frozen encoder's never are",
    )
    seed: int = Field(default=0, ge=0, lt=1 << 63, description="of everything that is drawn: order, dropout, adapters")
    # The losses
    diversity_loss_weight: float | None = Field(
        default=None,
        ge=0,
        description="of the gate's loss beside the language loss, which `losses.diversity_loss` names; 0: none; null: "
        "1 where there is a gate that learns",
    )
    losses: LossConfig = Field(default=LossConfig(), description="the gate's loss, and encoder dropout")
    auxiliary_loss: PartConfig | None = Field(
        default=None,
        description="a loss of your own beside the language loss: called with the model and its processor, gives an "
        "AuxiliaryLoss",
    )
    # The data
    batch_source: PartConfig | None = Field(
        default=None,
        description="packs of your own making instead of files: called with the recipe and the InputFormat, gives a "
        "BatchSource",
    )
    train_data_path: str | None = Field(default=None, description="one file or folder to train on; or else datasets")
    val_data_path: str | None = Field(default=None, description="held-out data, for evaluations")
    image_root: str | None = Field(
        default=None, description="where pictures lie, and the only place they may lie; null: the data file's folder"
    )
    datasets: tuple[DatasetConfig, ...] = Field(
        default=(), max_length=256, description="several sources to train on, drawn from by weight"
    )
    mixture_temperature: float = Field(
        default=1.0, gt=0, description="above 1 evens the data sets' weights out: weight ** (1 / temperature)"
    )
    caption_prompt: str = Field(
        default="Describe this image.", min_length=1, description="the question of a row that has an answer alone"
    )
    bad_samples: BadSampleConfig = Field(default=BadSampleConfig(), description="rows that can't be used")
    num_workers: int = Field(
        default=0, ge=0, le=256, description="processes that read pictures ahead; 0: the trainer itself"
    )
    # The run
    output_dir: str = Field(default="outputs", description="the run's folder: steps, events, the result")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="on val_data_path, at the start and at each epoch's and stage's end"
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None, description="end the run when held-out data gets no better; null: never"
    )
    checkpoints: CheckpointConfig = Field(
        default=CheckpointConfig(), description="saved at each epoch's and stage's end, and which of them are kept"
    )
    failures: FailureConfig = Field(default=FailureConfig(), description="a loss or a gradient that is not finite")
    loggers: tuple[Literal["jsonl", "tensorboard", "curves"], ...] = Field(
        default=("jsonl",),
        description="jsonl: events.jsonl; tensorboard: its files in the run's folder; curves: loss and gate as a "
        "picture, drawn of events.jsonl at the end. The last two need the extra train",
    )
    log_every_steps: Count = Field(default=1, description="steps from one step's event to the next; the last has one")
