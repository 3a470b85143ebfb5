"""From a recipe or a data set to the packs of each step.

In: a TrainConfig, or what `DualVisionTrainer` was given; out: a `BatchSource`. The data is scanned when the source is
built, so that nothing trains before bad rows are known. It knows no model and counts no time.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from model_core.errors import ConfigError, InputError, RecordError
from model_core.plugins import load_part
from model_core.processing.batch import InputFormat
from model_core.training.config import DatasetConfig, PartConfig, Stage, TrainConfig
from model_core.training.context import ProcessContext
from model_core.training.data.bad_samples import Quarantine
from model_core.training.data.collate import EncodedSample, encode_sample, pack
from model_core.training.data.datasets import DualVisionDataset
from model_core.training.data.loaders import unused_settings
from model_core.training.data.mixture import Mixture, mix
from model_core.training.data.multi import DATASET_TYPES, MultiDataset
from model_core.training.data.packs import BatchSource, PackedBatch, SampleRef
from model_core.training.data.plan import PackPlan, cut_packs, num_steps, packs_of_step
from model_core.training.data.prefetch import in_order
from model_core.training.data.scan import Checks, RowProblem, ScanReport, examine, reason_of, row_problem, scan
from model_core.types import ChatMessage

Split = Literal["train", "val"]
_ALONE = ProcessContext()
#: Problems in one event: a supervisor reads lines of up to a MiB.
_MOST_TOLD = 500
_SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True, slots=True)
class _Part:
    """One data set with what the scan found. weight: None where none was asked."""

    dataset: DualVisionDataset
    weight: float | None
    report: ScanReport


class PackSource:
    """A BatchSource over data sets on this machine. Validation data keeps the files' order and has no weights."""

    def __init__(
        self,
        parts: Sequence[tuple[DualVisionDataset, float | None]],
        config: TrainConfig,
        fmt: InputFormat,
        *,
        context: ProcessContext = _ALONE,
        split: Split = "train",
        temperature: float | None = None,
        unused: tuple[str, ...] = (),
    ) -> None:
        """Scan the data. Raises DataError for bad rows under `fail`, or past the budget under `quarantine`.

        unused: what a DataLoader around the data sets said that is not done (`unused_of`).
        """
        self._config, self._context, self._split, self.unused = config, context, split, unused
        self._temperature = temperature or config.mixture_temperature
        self._fmt, self._checks = replace(fmt, allow_paths=False), Checks(fmt.limits, fmt, config.max_tokens)
        self._plan_by(
            [_Part(one, weight, scan(one, self._checks, num_workers=config.num_workers)) for one, weight in parts]
        )
        self._quarantine = Quarantine(config.bad_samples, sum(part.report.num_rows for part in self._parts))
        self._quarantine.add(problem for part in self._parts for problem in part.report.errors)
        if split == "train":
            _check_batch(config.batch_size, sum(len(usable) for usable in self._usable))

    def _plan_by(self, parts: list[_Part]) -> None:
        """Take these reports for what packs are planned and made by."""
        self._parts, self._usable = parts, [part.report.usable for part in parts]
        self._work = functools.partial(
            _make_pack, [part.dataset for part in parts], [part.report.lengths for part in parts], self._fmt,
            self._config.max_tokens,
        )  # fmt: skip
        self._last_plan: tuple[Any, PackPlan] | None = None
        self._num_packs: dict[Any, int] = {}

    @property
    def dataset_names(self) -> tuple[str, ...]:
        return tuple(part.dataset.name for part in self._parts)

    def prepare_stage(self, stage: Stage) -> None:
        self._mixture(stage)

    def num_steps(self, stage: Stage, epoch: int) -> int:
        key = (self._mixture(stage), stage.index, epoch)
        if key not in self._num_packs:
            self._num_packs[key] = self._plan(stage, epoch).num_packs
        accumulation = self._config.gradient_accumulation_steps
        return num_steps(self._num_packs[key], accumulation, self._context.world_size)

    def steps(self, stage: Stage, epoch: int, *, first: int = 0) -> Iterator[list[PackedBatch]]:
        plan = self._plan(stage, epoch)
        deal = [
            packs_of_step(
                step, plan.num_packs, self._config.gradient_accumulation_steps,
                self._context.rank, self._context.world_size,
            )
            for step in range(first, self.num_steps(stage, epoch))
        ]  # fmt: skip
        numbers = [number for packs in deal for number in packs]
        made = in_order(functools.partial(self._work, plan), numbers, self._config.num_workers)
        for packs in deal:
            found = []
            for _ in packs:
                one, problems = next(made)
                self._quarantine.add(problems)
                found += [one] if one is not None else []
            yield found

    def fingerprint(self) -> str:
        parts = [(part.dataset.name, part.weight, part.report.num_rows, part.report.digest) for part in self._parts]
        lengths = hashlib.sha256(b"".join(part.report.lengths.tobytes() for part in self._parts)).hexdigest()
        said = json.dumps([self._split, self._temperature, parts, lengths])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def quarantine_report(self) -> list[dict[str, Any]]:
        return [one | {"split": self._split} for one in self._quarantine.report()]

    def quarantine_state(self) -> list[dict[str, Any]]:
        """The rows that went bad after the scan, each with what it was planned by."""
        reports = {part.dataset.name: part.report for part in self._parts}
        found = [(one, reports[one["dataset"]].planned(one["index"])) for one in self.quarantine_report()]
        return [one | planned for one, planned in found if planned is not None]

    def restore_quarantine(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `quarantine_state` said in an earlier process of this run.

        All of it counts. A row that can't be used now either is planned as it was there, so that packs and fingerprint
        are the same, and steps aside again in its turn; one that can be used is taken as the scan found it.

        Raises:
            BadSampleBudgetError: beside what else the scan has found it is too much.
        """
        self._quarantine.restore(map(RowProblem.from_json, rows))
        if rows:
            self._plan_by(
                [replace(part, report=part.report.restored(self._still_bad(part, rows))) for part in self._parts]
            )

    def _still_bad(self, part: _Part, rows: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
        """Which of these rows would step aside again: pixels are decoded to know, as in a pack."""
        checks = replace(self._checks, decode=True)
        found: dict[int, Mapping[str, Any]] = {}
        for one in rows:
            index = one["index"]
            is_here = one["dataset"] == part.dataset.name and index < part.report.num_rows
            if is_here and examine(part.dataset, index, checks).length != one["length"]:
                found[index] = one
        return found

    def problems(self) -> list[dict[str, Any]]:
        """Everything that the scan found, warnings and notes too."""
        return [one.to_json() | {"split": self._split} for part in self._parts for one in part.report.problems]

    def conversation(self, ref: SampleRef) -> list[ChatMessage]:
        """The messages of a sample, for generating an answer to it."""
        return self._parts[self.dataset_names.index(ref.dataset)].dataset.conversation(ref.index)

    def _mixture(self, stage: Stage) -> Mixture:
        sizes = [len(usable) for usable in self._usable]
        if self._split == "val":
            return mix(self.dataset_names, sizes, [None] * len(sizes))
        weights = [part.weight for part in self._parts]
        return mix(self.dataset_names, sizes, weights, self._temperature, stage.dataset_weights)

    def _plan(self, stage: Stage, epoch: int) -> PackPlan:
        mixture = self._mixture(stage)
        key = (mixture, stage.index, epoch)
        if self._last_plan is None or self._last_plan[0] != key:
            self._last_plan = (key, self._make_plan(mixture, stage.index, epoch))
        return self._last_plan[1]

    def _make_plan(self, mixture: Mixture, stage: int, epoch: int) -> PackPlan:
        if self._split == "val":
            which = np.repeat(np.arange(len(mixture.sizes)), mixture.sizes)
            index = np.concatenate([np.arange(size) for size in mixture.sizes])
        else:
            which, index = mixture.draw(self._config.seed, stage, epoch)
        lengths = np.empty(len(which), dtype=np.int64)
        for number, (part, usable) in enumerate(zip(self._parts, self._usable, strict=True)):
            here = which == number
            index[here] = usable[index[here]]
            lengths[here] = part.report.lengths[index[here]]
        return PackPlan(which, index, cut_packs(lengths, self._config.batch_size, self._config.max_tokens))


def build_source(
    config: TrainConfig, fmt: InputFormat, *, context: ProcessContext = _ALONE, split: Split = "train"
) -> BatchSource:
    """The recipe's training or validation data, scanned.

    Raises:
        ConfigError: the recipe names none. DataError: files or rows that can't be used.
    """
    if split == "train" and config.batch_source is not None:
        return _own_source(config.batch_source, config, fmt)
    if split == "train":
        described = config.train_sources()
    elif config.val_data_path is None:
        raise ConfigError(
            "the recipe names no validation data", value="val_data_path=None", allowed="val_data_path",
            fix="Set val_data_path in the file, or give --set val_data_path=FILE", param="val_data_path",
        )  # fmt: skip
    else:
        described = (DatasetConfig(data_path=config.val_data_path),)
    parts = [
        (
            DATASET_TYPES[one.type](
                one.data_path, one.image_root or config.image_root, name=one.name, caption_prompt=config.caption_prompt
            ),
            one.weight,
        )
        for one in described
    ]
    return PackSource(parts, config, fmt, context=context, split=split)


def problems_of(*sources: BatchSource | None) -> dict[str, Any]:
    """What the scans of the sources found, for an event: `num_problems`, and the first 500 of them as `problems`.

    What keeps a row from training comes first. A source without `problems` tells what it has set aside.
    """
    found: list[dict[str, Any]] = []
    for source in sources:
        if source is not None:
            found += getattr(source, "problems", source.quarantine_report)()
    found.sort(key=lambda one: _SEVERITIES.index(one.get("severity", "error")))
    return {"num_problems": len(found), "problems": found[:_MOST_TOLD]}


def unused_of(*sources: BatchSource | None) -> list[str]:
    """What the DataLoaders that the sources were made of said, and that a run does not do."""
    return [line for source in sources for line in getattr(source, "unused", ())]


def set_aside_of(*sources: BatchSource | None) -> list[dict[str, Any]]:
    """Every sample that the sources have set aside so far."""
    return [one for source in sources if source is not None for one in source.quarantine_report()]


def quarantine_of(*sources: BatchSource | None) -> list[list[dict[str, Any]]]:
    """What a checkpoint keeps of the samples that went bad in the run, by source."""
    return [source.quarantine_state() if hasattr(source, "quarantine_state") else [] for source in sources]


def restore_quarantine(kept: Sequence[Sequence[Mapping[str, Any]]], *sources: BatchSource | None) -> None:
    """Give `quarantine_of` back to the same sources in a resumed run. Raises BadSampleBudgetError."""
    for rows, source in zip(kept, sources, strict=False):  # a run from before this was kept has none
        if hasattr(source, "restore_quarantine"):
            source.restore_quarantine(rows)


def _own_source(part: PartConfig, config: TrainConfig, fmt: InputFormat) -> BatchSource:
    source = load_part(part.name, "batch source")(config, fmt, **part.options)
    if not isinstance(source, BatchSource):
        raise ConfigError(
            "this is no batch source", value=part.name, allowed=f"what {BatchSource.__module__}.BatchSource asks for",
            fix="Give it every method of that protocol", param="batch_source.name",
        )  # fmt: skip
    return source


def as_source(
    data: object, config: TrainConfig, fmt: InputFormat, split: Split = "train", *, context: ProcessContext = _ALONE
) -> BatchSource:
    """What `DualVisionTrainer` accepts as data: a source, a data set, or a torch DataLoader over one.

    Of a DataLoader its `dataset` is taken; order, packs and workers are the recipe's, so that a run can be resumed.
    What it says otherwise is told (`unused_of`) or, where it would train on something else, refused.

    Raises:
        ConfigError: it is none of these; as `unused_settings` and `build_source`.
    """
    if isinstance(data, BatchSource):
        return data
    param = f"{split}_loader"
    loader, data = (data, data.dataset) if isinstance(data, DataLoader) else (None, data)
    if not isinstance(data, MultiDataset | DualVisionDataset):
        raise ConfigError(
            "this is no training data", value=type(data).__name__,
            allowed="a DualVisionDataset, a MultiDataset, a DataLoader over one, or a BatchSource",
            fix="Derive your data set from DualVisionDataset and override format_conversations", param=param,
        )  # fmt: skip
    unused = () if loader is None else unused_settings(loader, config, param)
    if isinstance(data, DualVisionDataset):
        return PackSource([(data, None)], config, fmt, context=context, split=split, unused=unused)
    parts = list(zip(data.datasets, data.weights or [None] * len(data.datasets), strict=True))
    return PackSource(parts, config, fmt, context=context, split=split, temperature=data.temperature, unused=unused)


def _check_batch(batch_size: int, num_samples: int) -> None:
    """An epoch of less than one batch is a mistake in one of the two numbers."""
    if 0 < num_samples < batch_size:
        raise ConfigError(
            "a batch is larger than the data", value=f"batch_size {batch_size}, {num_samples} samples that can train",
            allowed=f"batch_size up to {num_samples}", fix="Lower batch_size, or name the data that was meant",
            param="batch_size",
        )  # fmt: skip


def _make_pack(
    datasets: Sequence[DualVisionDataset], lengths: Sequence[Any], fmt: InputFormat, max_tokens: int, plan: PackPlan,
    number: int,
) -> tuple[PackedBatch | None, list[RowProblem]]:  # fmt: skip
    """A pack, and the rows that could not be in it; in a worker process errors can only travel as values."""
    refs: list[SampleRef] = []
    samples: list[EncodedSample] = []
    problems: list[RowProblem] = []
    for which, index in plan.pack(number):
        dataset = datasets[which]
        try:
            sample = encode_sample(dataset.sample(index), fmt, max_tokens)
            _check_same(len(sample.input_ids), int(lengths[which][index]))
        except (InputError, RecordError) as error:
            problems.append(row_problem(dataset, index, "error", reason_of(error), str(error)))
        else:
            refs.append(SampleRef(f"{dataset.name}:{index}", dataset.name, index))
            samples.append(sample)
    return (pack(refs, samples) if samples else None), problems


def _check_same(length: int, planned: int) -> None:
    if length != planned:
        raise RecordError(
            "changed", "the sample is not the one that was looked at before training", value=f"{length} tokens",
            allowed=f"{planned} tokens", fix="Leave the files alone while a run reads them, and start again",
        )  # fmt: skip
