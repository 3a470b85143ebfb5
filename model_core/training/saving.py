"""A step of a run on disk and back: weights, adapters, optimizer, and everything else that the next step depends on.

In: a live run; out: a folder that is whole or not there, in safetensors and JSON; and the same run again. Generators
have no state here: every step draws from the seed and its own number (`step.py`).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model_core.checkpoint import LoadOptions, load_checkpoint, save_checkpoint
from model_core.errors import CheckpointError, CheckpointMismatchError, StorageFullError
from model_core.training.auxiliary import AuxiliaryLoss
from model_core.training.config import FreezeConfig, TrainConfig, parse_config
from model_core.training.curriculum import Position
from model_core.training.data.packs import BatchSource, PackedBatch
from model_core.training.data.source import restore_quarantine
from model_core.training.freeze import FreezeTable
from model_core.training.lora import apply_lora
from model_core.training.muon import is_block_matrix
from model_core.training.runs import (
    ADAPTERS_NAME,
    AUXILIARY_NAME,
    FINAL,
    OPTIMIZER_NAME,
    SUMMARY,
    TRAINER_NAME,
    RunFolder,
    read_trainer,
    storage,
    write_json,
)
from model_core.training.weights import adapter_state, load_weights, merged_state, plain_state


@dataclass(slots=True)
class RunState:
    """What `trainer.json` holds beside the recipe. Everything is JSON.

    position: steps done, by epoch, stage and in all. live_freeze: settings that a switch brought in, until the stage
    ends. freeze: the table in force, for readers. freeze_check: where the look at a stage's first steps is not over.
    untold_samples: trained on since a step was last told of, by data set. set_aside: samples that went bad in the run,
    of training and held-out data (`data.source.quarantine_of`). switches: stage, step and mode of each switch so far.
    """

    position: dict[str, int] = field(default_factory=dict)
    begun_stage: int | None = None
    live_freeze: dict[str, Any] | None = None
    freeze: dict[str, Any] = field(default_factory=dict)
    freeze_check: dict[str, Any] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    gate_loss: dict[str, Any] | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    trained_tokens: int = 0
    skipped_in_a_row: int = 0
    untold_samples: Counter[str] = field(default_factory=Counter)
    set_aside: list[list[dict[str, Any]]] = field(default_factory=list)
    switches: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], folder: Path) -> Self:
        """Of a `trainer.json`, which lies there. Raises CheckpointError: a field is missing."""
        came_later: dict[str, Any] = {"untold_samples": {}, "set_aside": [], "switches": []}  # older runs go on as well
        content = came_later | dict(content)
        try:
            state = cls(**{one.name: content[one.name] for one in fields(cls)})
        except KeyError as error:
            raise CheckpointError(
                f"{TRAINER_NAME} lacks {error}", value=str(folder), allowed="every field of a run's state",
                fix=f"Resume from another step, or start a new run from this one: --set start_from={folder}",
            ) from error  # fmt: skip
        state.untold_samples = Counter(state.untold_samples)
        return state

    def switched(self, freeze: FreezeConfig, position: Position) -> None:
        """Keep what trains from this step on, until the stage ends."""
        self.live_freeze = freeze.model_dump(mode="json")
        switch = {"stage": position.stage, "step": position.global_step, "training_mode": freeze.mode}
        self.switches.append(switch)

    def check_gate_loss(self, gate_loss: object | None) -> None:
        """Raises CheckpointMismatchError: the run had one and this one has none, or the other way round."""
        if (self.gate_loss is None) != (gate_loss is None):
            raise CheckpointMismatchError(
                "the saved run had another gate loss", value=self.gate_loss, allowed="the recipe's",
                fix="Start a run from it (start_from)", param="losses",
            )  # fmt: skip

    def count_step(self, packs: Sequence[PackedBatch]) -> None:
        """A step was taken on these."""
        self.skipped_in_a_row = 0
        self.trained_tokens += sum(len(pack.input_ids) for pack in packs)
        self.untold_samples.update(sample.dataset for pack in packs for sample in pack.samples)

    def take_counts(self, names: Sequence[str]) -> dict[str, Any]:
        """Tokens so far; samples since this was asked last, of each data set in the order of `names`."""
        counts, self.untold_samples = self.untold_samples, Counter()
        return {"trained_tokens": self.trained_tokens, "dataset_samples": [counts[name] for name in names]}

    def to_json(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self)}


def save_step(
    folder: Path, model: nn.Module, processor: Any, config: TrainConfig, state: RunState, *,
    reason: str, optimizer_tensors: Mapping[str, Tensor], data_fingerprint: str, auxiliary: AuxiliaryLoss | None = None,
) -> None:  # fmt: skip
    """Write a step's folder. An older folder of the same step is replaced in one move."""
    content = {
        "format": "dve-trainer", "version": 1, "recipe_fingerprint": config.fingerprint(),
        "data_fingerprint": data_fingerprint, "recipe": config.model_dump(mode="json"), **state.to_json(),
    }  # fmt: skip

    def write_more(target: Path) -> None:
        write_json(target / TRAINER_NAME, content)
        save_file(dict(optimizer_tensors), target / OPTIMIZER_NAME)
        if auxiliary is not None:
            own = {name: tensor.contiguous() for name, tensor in auxiliary.state_dict().items()}
            save_file(own, target / AUXILIARY_NAME)
        adapters = adapter_state(model)
        if adapters:
            save_file(adapters, target / ADAPTERS_NAME)

    extra = {
        "reason": reason, "stage": state.position["stage"], "step": state.position["global_step"],
        "metrics": state.scores.get("latest", {}),
    }  # fmt: skip
    save_checkpoint(model, processor, folder, extra, write_more, state_dict=plain_state(model))


def load_step(
    folder: Path, model: nn.Module, config: TrainConfig, sources: Sequence[BatchSource | None],
    auxiliary: AuxiliaryLoss | None = None,
) -> tuple[RunState, dict[str, Tensor]]:  # fmt: skip
    """Load a step's weights into the model and the auxiliary loss; its state and its optimizer's tensors.

    sources: of training, then held-out data; they get back what the run had set aside. Nothing is written.

    Raises:
        CheckpointMismatchError: another recipe, data or model. BadSampleBudgetError: too much is bad by now.
    """
    content = read_trainer(folder)
    _check_recipe(content, config)
    state = RunState.from_json(content, folder)
    restore_quarantine(state.set_aside, *sources)
    data_fingerprint = sources[0].fingerprint()
    if content["data_fingerprint"] != data_fingerprint:
        raise CheckpointMismatchError(
            "the training data is not what the run began with", value=data_fingerprint,
            allowed=str(content["data_fingerprint"]), fix="Give the files back as they were, or start a new run from "
            f"this checkpoint: --set start_from={folder}", param="train_data_path",
        )  # fmt: skip
    load_weights(model, folder, folder / ADAPTERS_NAME)
    if auxiliary is not None:
        _load_auxiliary(auxiliary, folder / AUXILIARY_NAME)
    return state, load_file(folder / OPTIMIZER_NAME)


def check_room(folder: Path, model: nn.Module, tables: Sequence[FreezeTable], config: TrainConfig) -> None:
    """Before a run: has the disk of its folder room for one step of it, at its largest?

    Counted are weights, and moments and masters of all that any of the tables trains; never more than is written.

    Raises:
        StorageFullError: it has not.
    """
    trained = {name for table in tables for name in table.trained_names}
    need = 0
    for name, parameter in model.named_parameters():
        has_one = config.optimizer == "muon" and is_block_matrix(name, parameter)
        is_short = parameter.dtype != torch.float32
        state = (4 if has_one else 8) + (4 if is_short else 0)
        need += parameter.numel() * (parameter.element_size() + (state if name in trained else 0))
    with storage(folder):
        there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
        disk = shutil.disk_usage(there)
    if disk.total and need > disk.free:  # some network disks tell no size at all
        raise StorageFullError(
            "the disk has no room for one checkpoint of this run", value=f"{_gigabytes(disk.free)} free in {there}",
            allowed=f"at least {_gigabytes(need)}, once for each step that is kept and for the result",
            fix="Make room, name an output_dir on another disk, or train less: fusion_only, or lora",
            param="output_dir",
        )  # fmt: skip


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _load_auxiliary(auxiliary: AuxiliaryLoss, path: Path) -> None:
    try:
        auxiliary.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise CheckpointMismatchError(
            "the auxiliary loss is not the one that was saved", value=str(error).splitlines()[0],
            allowed=f"the parameters of {path.name}", fix="Resume with the run's own auxiliary_loss",
            param="auxiliary_loss",
        ) from error  # fmt: skip


def _check_recipe(content: Mapping[str, Any], config: TrainConfig) -> None:
    if content["recipe_fingerprint"] == config.fingerprint():
        return
    now, then = config.model_dump(mode="json"), content["recipe"]
    changed = [key for key in sorted(now) if now[key] != then.get(key) and key not in TrainConfig.HARMLESS]
    raise CheckpointMismatchError(
        "the recipe is not the one that the run began with",
        value="; ".join(part for key in changed for part in _differences(now[key], then.get(key), key))
        or "another version's recipe",
        allowed="the same recipe; " + ", ".join(sorted(TrainConfig.HARMLESS)) + " may differ",
        fix="Resume with the run's own recipe.json, or start a new run with this checkpoint as 'start_from'",
        param=changed[0] if changed else "resume",
    )


def _differences(now: Any, then: Any, at: str) -> Iterator[str]:
    """What differs and nothing beside it: of a section's twenty keys the one that was changed."""
    if isinstance(now, dict) and isinstance(then, dict):
        for key in sorted({*now, *then}):
            yield from _differences(now.get(key), then.get(key), f"{at}.{key}")
    elif now != then:
        yield f"{at}={now!r}, was {then!r}"


def save_result(run: RunFolder, model: nn.Module, processor: Any, config: TrainConfig, summary: dict[str, Any]) -> Path:
    """The run's result as an ordinary model folder, adapters folded in, and its summary, which is told where both are.

    Where the recipe stops by a metric, the result is the step that was best by it, and stands in the model too.
    """
    best, target = run.best(), run.path / FINAL
    source = best if config.early_stopping is not None else None
    with storage(run.path):
        if source is not None:
            load_weights(model, source, source / ADAPTERS_NAME)
        save_checkpoint(model, processor, target, {"from": source.name if source else "last step"},
                        state_dict=merged_state(model))  # fmt: skip
        summary |= {"final": str(target), "best": None if best is None else str(best)}
        write_json(run.path / SUMMARY, summary)
    return target


@contextmanager
def whole_model(folder: Path, scratch: Path) -> Iterator[Path]:
    """A folder of a run as an ordinary model: itself, or where adapters lie beside a step, a copy with them folded in.

    scratch: where the copy is written, a folder on a disk with room for a whole model; it is made if need be. The copy
    is gone when the context ends. Raises CheckpointError, ConfigError (peft is not installed).
    """
    if not (folder / ADAPTERS_NAME).is_file():
        yield folder
        return
    loaded = load_checkpoint(folder, LoadOptions("cpu"))
    apply_lora(loaded.model, parse_config(read_trainer(folder)["recipe"]).lora, seed=0)
    load_weights(loaded.model, folder, folder / ADAPTERS_NAME)
    with _fold_folder(scratch) as mine:
        target = mine / folder.name
        save_checkpoint(loaded.model, loaded.processor, target, state_dict=merged_state(loaded.model))
        del loaded
        yield target


@contextmanager
def _fold_folder(parent: Path) -> Iterator[Path]:
    """A folder in `parent`, locked while it is used: what killed processes left there is nobody's, and goes first.

    Its name is one that `recover` clears away too.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob(".folded.*.tmp"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left)
    mine = parent / f".folded.{secrets.token_hex(4)}.tmp"
    mine.mkdir()
    try:
        with _locked(mine):
            yield mine
    finally:
        shutil.rmtree(mine, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
