"""One optimizer step: its packs forward and backward, the losses weighed against the whole step, then the update.

In: the packs of a step and where in the run it stands; out: a `StepResult`. Every random number of a step is drawn
from (seed, global step), so that no generator's state has to be kept. It decides nothing about what trains and
writes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from model_core.errors import NonFiniteLossError, TrainingMemoryError
from model_core.training.auxiliary import LANGUAGE, AuxiliaryLoss
from model_core.training.config import Stage, TrainConfig
from model_core.training.cpu_kernels import give_back_memory
from model_core.training.data.packs import PackedBatch
from model_core.training.forward import PackForward, PackOutput
from model_core.training.losses import IGNORE, GateLoss, encoder_dropout, gate_statistics, next_token_labels
from model_core.training.optim import NamedOptimizer
from model_core.training.verify import FreezeCheck

#: How torch words an allocation that failed on a CPU; on CUDA it has a type of its own.
_CPU_OUT_OF_MEMORY = "can't allocate memory"


@dataclass(frozen=True, slots=True)
class StepPlace:
    """Where a step stands. scale: the schedule's share of the rates; progress: the share of all steps done."""

    stage: Stage
    epoch: int
    global_step: int
    scale: float
    progress: float


@dataclass(slots=True)
class StepResult:
    """loss: per label token; gate_loss: weighted, per image; both nan where they were. dataset_losses: by name.

    auxiliary_losses: by name, not weighted; a mean over the packs that had one.
    """

    loss: float
    gate_loss: float
    grad_norm: float
    num_tokens: int
    num_label_tokens: int
    num_samples: int
    num_images: int
    gate: dict[str, Any] | None = None
    dataset_losses: dict[str, float] = field(default_factory=dict)
    auxiliary_losses: dict[str, float] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.loss, self.gate_loss, self.grad_norm, *self.auxiliary_losses.values())))

    @property
    def seen(self) -> str:
        more = "".join(f", {name} {value}" for name, value in self.auxiliary_losses.items())
        return f"loss {self.loss}, gate loss {self.gate_loss}{more}, gradient norm {self.grad_norm}"


#: Packs differ in length, so what one frees seldom fits the next: 500 steps of the demo had grown a process that needs
#: 1.3 GB to 7. To hand it back takes 50 ms.
_STEPS_BETWEEN_TRIMS = 50


class StepRunner:
    """Runs steps of one model with one optimizer."""

    def __init__(
        self, forward: PackForward, optimizer: NamedOptimizer, gate_loss: GateLoss | None, config: TrainConfig,
        auxiliary: AuxiliaryLoss | None = None,
    ) -> None:  # fmt: skip
        self.forward, self.optimizer, self.gate_loss, self.config = forward, optimizer, gate_loss, config
        self.auxiliary = auxiliary
        self._fusion, self._num_run = forward.model.fusion, 0

    def run(self, packs: Sequence[PackedBatch], place: StepPlace, check: FreezeCheck | None) -> StepResult:
        """A step that is not finite changes nothing: neither weights, nor moments, nor means.

        Raises:
            TrainingMemoryError: a pack does not fit the device.
        """
        means = {name: buffer.clone() for name, buffer in self._fusion.means.named_buffers()}
        self.optimizer.zero_grad()
        self.optimizer.set_learning_rate(place.scale)
        if self.gate_loss is not None:
            self.gate_loss.begin_step(place.progress)
        sums = _Sums(packs)
        devices = [self.forward.device] if self.forward.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(step_seed(self.config.seed, place.global_step))
            for pack in packs:
                self._backward(pack, place, sums)
        result = sums.result()
        if result.is_finite:
            if check is not None:
                check.after_backward(self.optimizer)
            result.grad_norm = self.optimizer.step()
        if not result.is_finite:
            for name, buffer in self._fusion.means.named_buffers():
                buffer.copy_(means[name])
        if self.gate_loss is not None:
            self.gate_loss.end_step(keep=result.is_finite)
        self._num_run += 1
        if self._num_run % _STEPS_BETWEEN_TRIMS == 0 and self.forward.device.type == "cpu":
            give_back_memory()
        return result

    def _backward(self, pack: PackedBatch, place: StepPlace, sums: _Sums) -> None:
        try:
            output = self._forward(pack, place)
            loss = output.losses.sum() / sums.num_labels
            gate = self._gate_loss(output)
            if gate is not None:
                gate = gate * (len(pack.grids) / sums.num_images)
            weight = place.stage.loss_weights.get(LANGUAGE, 1.0)
            total = loss if weight == 1.0 else loss * weight
            total = total if gate is None else total + gate
            total = total + self._auxiliary_loss(output, place, sums)
            if total.requires_grad:
                total.backward()
            self.optimizer.accumulate()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or _CPU_OUT_OF_MEMORY in str(error):
                raise _out_of_memory(pack, self.config) from error
            raise
        sums.add(pack, output, loss, gate)

    def _forward(self, pack: PackedBatch, place: StepPlace) -> PackOutput:
        if place.stage.loss_weights.get(LANGUAGE, 1.0):
            return self.forward(pack, removed=self._hidden_encoders(pack, place))
        silent = torch.zeros(len(pack.samples), device=self.forward.device)
        return PackOutput(silent, None, self.forward.encode_only(pack))

    def _auxiliary_loss(self, output: PackOutput, place: StepPlace, sums: _Sums) -> Tensor | float:
        """The weighted sum, this pack's share of the step."""
        if self.auxiliary is None or output.view is None:
            return 0.0
        with torch.autocast(self.forward.device.type, enabled=False):
            found = self.auxiliary(output.view)
        share = len(output.view.pack.samples) / sums.num_samples
        weights = place.stage.loss_weights
        sums.add_auxiliary(found)
        # A loss that counts nothing stays out: its gradient of zeros would move what has momentum.
        counted = {name: loss for name, loss in found.items() if weights.get(name, 1.0)}
        return sum((weights.get(name, 1.0) * share * loss for name, loss in counted.items()), 0.0)

    def _gate_loss(self, output: PackOutput) -> Tensor | None:
        if self.gate_loss is None or output.weights is None or not output.weights.requires_grad:
            return None
        return self.gate_loss(output.weights)

    def _hidden_encoders(self, pack: PackedBatch, place: StepPlace) -> Tensor | None:
        chance = self.config.encoder_dropout_in(self.optimizer.table.freeze.mode)  # a switch may have come
        if not chance or not pack.grids:
            return None
        keys = [f"{sample.key}:{place.stage.index}:{place.epoch}" for sample in pack.samples]
        names = self._fusion.encoder_names
        return encoder_dropout(chance, len(names), pack.images_per_sample, keys, self.config.seed)


class _Sums:
    """What a step adds up, over its packs."""

    def __init__(self, packs: Sequence[PackedBatch]) -> None:
        weighted = any(pack.label_weights is not None for pack in packs)
        counts = (sum(label_totals(pack)) if weighted else pack.num_label_tokens for pack in packs)
        self.num_labels = sum(counts) or 1
        self.num_samples = max(1, sum(len(pack.samples) for pack in packs))
        self.num_images = max(1, sum(len(pack.grids) for pack in packs))
        self._packs = packs
        self._loss: list[Tensor] = []
        self._gate: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._by_dataset: dict[str, tuple[list[Tensor], float]] = {}
        self._auxiliary: dict[str, list[Tensor]] = {}

    def add_auxiliary(self, found: Mapping[str, Tensor]) -> None:
        for name, loss in found.items():
            self._auxiliary.setdefault(name, []).append(loss.detach())

    def add(self, pack: PackedBatch, output: PackOutput, loss: Tensor, gate: Tensor | None) -> None:
        self._loss.append(loss.detach())
        if gate is not None:
            self._gate.append(gate.detach())
        if output.weights is not None:
            self._weights.append(output.weights.detach().float())
        losses = output.losses.detach()
        counts = label_totals(pack)
        for dataset in dict.fromkeys(sample.dataset for sample in pack.samples):
            mine = [i for i, sample in enumerate(pack.samples) if sample.dataset == dataset]
            found, count = self._by_dataset.get(dataset, ([], 0))
            self._by_dataset[dataset] = ([*found, losses[mine].sum()], count + sum(counts[i] for i in mine))

    def result(self) -> StepResult:
        # Summed once more by dataset, from the same numbers: the step's own loss is what was differentiated.
        by_dataset = {
            name: float(torch.stack(found).sum()) / (count or 1) for name, (found, count) in self._by_dataset.items()
        }
        return StepResult(
            loss=float(torch.stack(self._loss).sum()) if self._loss else 0.0,
            gate_loss=float(torch.stack(self._gate).sum()) if self._gate else 0.0,
            grad_norm=0.0,
            num_tokens=sum(len(pack.input_ids) for pack in self._packs),
            num_label_tokens=sum(pack.num_label_tokens for pack in self._packs),
            num_samples=sum(len(pack.samples) for pack in self._packs),
            num_images=sum(len(pack.grids) for pack in self._packs),
            gate=gate_statistics(torch.cat(self._weights)) if self._weights else None,
            dataset_losses=by_dataset,
            auxiliary_losses={name: float(torch.stack(found).mean()) for name, found in self._auxiliary.items()},
        )


def label_counts(pack: PackedBatch) -> list[int]:
    """Label tokens that count, of each sample."""
    targets = next_token_labels(pack.labels, pack.sample_lengths) != IGNORE
    return [int(part.sum()) for part in targets.split(list(pack.sample_lengths))]


def label_totals(pack: PackedBatch) -> Sequence[float]:
    """The weights of each sample's labels, summed: what its loss is to be divided by."""
    if pack.label_weights is None:
        return label_counts(pack)
    targets = next_token_labels(pack.labels, pack.sample_lengths) != IGNORE
    weights = pack.label_weights.roll(-1) * targets
    return [float(part.sum()) for part in weights.split(list(pack.sample_lengths))]


def step_seed(seed: int, global_step: int) -> int:
    """What dropout draws from in this step: a function of both numbers alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{global_step}".encode(), digest_size=7).digest(), "big")


def non_finite(result: StepResult, global_step: int) -> NonFiniteLossError:
    """The error that ends a run at a step whose numbers are none."""
    return NonFiniteLossError(
        f"step {global_step} is not finite", value=result.seen, allowed="numbers",
        fix="Lower the learning rates or max_grad_norm, look at the step's samples, or set failures.nan=skip; the last "
        "checkpoint is intact", param="failures.nan",
    )  # fmt: skip


def _out_of_memory(pack: PackedBatch, config: TrainConfig) -> TrainingMemoryError:
    return TrainingMemoryError(
        "a pack does not fit the device's memory",
        value=f"{len(pack.input_ids)} tokens, {len(pack.samples)} samples, {len(pack.grids)} images",
        allowed=f"less than max_tokens={config.max_tokens}, batch_size={config.batch_size}",
        fix="Lower max_tokens or batch_size (gradient_accumulation_steps makes up for it), add 'llm' to "
        "gradient_checkpointing, or train less: fusion_only, or lora",
        param="max_tokens",
    )
