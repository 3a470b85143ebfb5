"""From a request for a job to a recipe: the only place that knows both the body's words and `TrainConfig`.

In: a validated body, the model source that its `model` means. Out: what the store keeps. Refuses whatever contradicts
itself, with the body's path of it. It reads no file and knows no running job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model_core.errors import ConfigError, InvalidRequestError
from model_core.training.config import DEFAULT_LEARNING_RATES, TrainConfig, parse_config
from service.protocol.fine_tuning import CreateJobRequest, FreezeRequest, Hyperparameters, JobFusion, Resources

DEMO = "dve-demo"

#: Where TrainConfig's keys stand in the body, for errors.
_PLACES: Mapping[str, str] = {
    "freeze_config": "fusion.freeze",
    "training_mode": "fusion.freeze.mode",
    "curriculum_training": "fusion.curriculum",
    "val_data_path": "validation_file",
    "learning_rates": "hyperparameters.learning_rate_multiplier",
    "num_epochs": "hyperparameters.n_epochs",
    "batch_size": "hyperparameters.batch_size",
}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """What a model id stands for: `settings` are TrainConfig's keys (model, or the pair of names; none: the demo)."""

    model_id: str
    settings: Mapping[str, str]


def to_recipe(body: CreateJobRequest, source: ModelSource, seed: int) -> TrainConfig:
    """The recipe of a body, file ids in the place of paths. Raises InvalidRequestError."""
    fusion, hyperparameters = body.fusion or JobFusion(), body.chosen_hyperparameters()
    _check_contradictions(body, fusion, hyperparameters)
    rates = _rates(hyperparameters)
    data: dict[str, Any] = {
        **source.settings,
        "seed": seed,
        "datasets": _datasets(body, fusion),
        "val_data_path": body.validation_file,
        "learning_rates": rates,
        **_trained(fusion),
    }
    if hyperparameters.n_epochs != "auto":
        data["num_epochs"] = hyperparameters.n_epochs
    if hyperparameters.batch_size != "auto":
        data["batch_size"] = hyperparameters.batch_size
    if fusion.resources is not None:
        data["device"] = fusion.resources.device
    sections = ("losses", "lora", "early_stopping", "bad_samples")
    data |= {name: getattr(fusion, name).model_dump() for name in sections if getattr(fusion, name) is not None}
    try:
        return parse_config(data)
    except ConfigError as error:
        first, _, rest = (error.param or "").partition(".")
        place = _PLACES.get(first, f"fusion.{first}" if first else "fusion")
        param = f"{place}.{rest}" if rest else place
        raise InvalidRequestError(
            error.what, value=error.value, allowed=error.allowed, fix=error.fix, param=param
        ) from None


def to_freeze_settings(freeze: FreezeRequest) -> dict[str, Any]:
    """`FreezeConfig`'s keys: what `--control-fd` and a recipe take."""
    flags = freeze.flags.model_dump(exclude_none=True) if freeze.flags else {}
    settings: dict[str, Any] = {**({"mode": freeze.mode} if freeze.mode else {}), **flags}
    return settings | ({"rules": [rule.model_dump() for rule in freeze.rules]} if freeze.rules else {})


def base_flags(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """What a recipe's model was made from, as `dve publish` takes it; `start_from` is no base."""
    pair = [(f"--{name}", recipe.get(name)) for name in ("qwen_model_name", "dinov2_model_name")]
    if all(value for _, value in pair):
        return tuple(str(word) for one in pair for word in one)
    return "--base", str(recipe.get("model") or DEMO)


def num_gpus_of(fusion: JobFusion) -> int:
    """The least that a worker must have."""
    resources = fusion.resources
    if resources is None:
        return 0
    return max(resources.num_gpus, 1) if resources.device == "cuda" else resources.num_gpus


def files_of(body: CreateJobRequest) -> dict[str, str]:
    """Every file that a body names -> where it names it."""
    named = {body.training_file: "training_file"}
    if body.validation_file is not None:
        named.setdefault(body.validation_file, "validation_file")
    for index, dataset in enumerate((body.fusion.datasets if body.fusion else None) or ()):
        named.setdefault(dataset.file, f"fusion.datasets[{index}].file")
    return named


def _check_contradictions(body: CreateJobRequest, fusion: JobFusion, hyperparameters: Hyperparameters) -> None:
    resources, trained_on = fusion.resources or Resources(), _training_files(body, fusion)
    has_stages = fusion.curriculum is not None
    # Of each: whether it is so; what, value, allowed and fix of its message; where it stands.
    wrong: list[tuple[bool, str, object, str, str, str]] = [
        (
            has_stages and fusion.freeze is not None,
            "a curriculum's stages say what trains, and so does 'fusion.freeze'", "both", "one of the two",
            "Move it into the stages' own 'freeze'", "fusion.freeze",
        ),
        (
            has_stages and hyperparameters.n_epochs != "auto",
            "a curriculum's stages have epochs of their own", hyperparameters.n_epochs, "'auto', or no curriculum",
            "Leave it out, and set the stages' 'epochs'", "hyperparameters.n_epochs",
        ),
        (
            fusion.early_stopping is not None and body.validation_file is None,
            "early stopping looks at the validation file, and there is none", "none", "a 'validation_file'",
            "Name a 'validation_file', or leave early stopping out", "fusion.early_stopping",
        ),
        (
            resources.device == "cpu" and resources.num_gpus > 0,
            "the job is to run on the CPU and to have GPUs", f"cpu and {resources.num_gpus} GPUs", "one of the two",
            "Set 'device' to cuda, or leave 'num_gpus' out", "fusion.resources",
        ),
        (
            resources.num_gpus > 1,
            "one process trains a job, on one GPU", resources.num_gpus, "0 or 1",
            "Set it to 1", "fusion.resources.num_gpus",
        ),
        (
            body.validation_file in trained_on,
            "the validation file is a training file as well", body.validation_file, "a file of its own",
            "Upload held-out rows as a file of their own, or leave it out", "validation_file",
        ),
        (
            fusion.datasets is not None and body.training_file not in trained_on,
            "'training_file' is not among 'fusion.datasets'", body.training_file, "one of their files",
            "Add it to 'fusion.datasets', or name one of those", "training_file",
        ),
    ]  # fmt: skip
    for index, stage in enumerate(fusion.curriculum or ()):
        others = sorted(set(stage.dataset_weights or ()) - set(trained_on))
        wrong.append((
            bool(others),
            "a stage weighs a file that the job does not train on", ", ".join(others), "files of 'fusion.datasets'",
            "Leave it out, or add it to 'fusion.datasets'", f"fusion.curriculum[{index}].dataset_weights",
        ))  # fmt: skip
    for is_wrong, what, value, allowed, fix, param in wrong:
        if is_wrong:
            raise InvalidRequestError(what, value=value, allowed=allowed, fix=fix, param=param)


def _training_files(body: CreateJobRequest, fusion: JobFusion) -> list[str]:
    return [dataset.file for dataset in fusion.datasets] if fusion.datasets else [body.training_file]


def _datasets(body: CreateJobRequest, fusion: JobFusion) -> list[dict[str, Any]]:
    if fusion.datasets is None:
        return [{"data_path": body.training_file, "name": body.training_file}]
    return [
        {"data_path": dataset.file, "name": dataset.file, "weight": dataset.weight, "type": dataset.type}
        for dataset in fusion.datasets
    ]


def _rates(hyperparameters: Hyperparameters) -> dict[str, float]:
    times = hyperparameters.learning_rate_multiplier
    return {} if times == "auto" else {name: rate * times for name, rate in DEFAULT_LEARNING_RATES.items()}


def _trained(fusion: JobFusion) -> dict[str, Any]:
    if fusion.curriculum is not None:
        stages = [
            {
                "mode": stage.mode,
                "freeze_config": to_freeze_settings(stage.freeze) if stage.freeze else None,
                "epochs": stage.epochs,
                "description": stage.description,
                "learning_rate": stage.learning_rate,
                "dataset_weights": stage.dataset_weights,
            }
            for stage in fusion.curriculum
        ]
        return {"curriculum_training": {"enabled": True, "stages": stages}}
    return {"freeze_config": to_freeze_settings(fusion.freeze)} if fusion.freeze else {}
