"""How good the model is on held-out data: loss fused and unfused, answers generated, the gate over it.

In: packs, and a callable that answers conversations (`engine` and `training` never meet: whoever joins them hands it
in); out: an `Evaluation`. It changes no weight and no mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from model_core.errors import ConfigError
from model_core.training.config import TrainConfig
from model_core.training.data.packs import BatchSource, PackedBatch, SampleRef
from model_core.training.forward import PackForward
from model_core.training.hooks import Answer
from model_core.training.losses import gate_statistics
from model_core.training.step import label_counts
from model_core.types import Arm, ChatMessage, TextPart


@dataclass(frozen=True, slots=True)
class Evaluation:
    """val_loss, unfused_loss: per label token, fused and past the fusion (None where it was not asked).

    val_accuracy: share of generated answers that say what the reference says, None without answers; unfused_accuracy
    likewise. dataset_losses: by name. sample_losses: (fused, unfused or None, label tokens) of each sample, in order.
    """

    val_loss: float
    unfused_loss: float | None
    val_accuracy: float | None
    unfused_accuracy: float | None
    gate: dict[str, Any] | None
    num_samples: int
    num_answers: int
    dataset_losses: dict[str, float]
    sample_losses: tuple[tuple[float, float | None, float], ...] = field(repr=False, default=())
    hits: tuple[tuple[bool, bool | None], ...] = field(repr=False, default=())

    def metrics(self) -> dict[str, float]:
        """The numbers that a checkpoint and an event carry."""
        found = {
            "val_loss": self.val_loss, "unfused_loss": self.unfused_loss, "val_accuracy": self.val_accuracy,
            "unfused_accuracy": self.unfused_accuracy,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        return {
            **self.metrics(), "gate": self.gate, "num_samples": self.num_samples, "num_answers": self.num_answers,
            "dataset_losses": self.dataset_losses,
        }  # fmt: skip


class Evaluator:
    """Evaluates one model on one source of held-out samples. answer: for generated answers; None: losses alone."""

    def __init__(
        self, forward: PackForward, config: TrainConfig, source: BatchSource, *, answer: Answer | None = None
    ) -> None:
        self.forward, self.config, self.source, self._answer = forward, config.evaluation, source, answer
        self._stage = config.stages()[0]  # always the same one: its number is part of the order
        source.prepare_stage(self._stage)

    @property
    def can_answer(self) -> bool:
        """Will an evaluation generate answers?"""
        return self._answer is not None and self.config.num_answers > 0

    def packs(self) -> Iterator[PackedBatch]:
        """The held-out samples, in the same order every time."""
        for packs in self.source.steps(self._stage, 0):
            yield from packs

    def run(self) -> Evaluation:
        """Every held-out sample's loss, and `num_answers` answers."""
        arms: list[Arm] = ["fused", "unfused"] if self.config.unfused_floor else ["fused"]
        losses: dict[str, list[float]] = {arm: [] for arm in arms}
        counts: list[float] = []
        refs: list[SampleRef] = []
        weights = []
        with _evaluating(self.forward.model), torch.no_grad():
            for pack in self.packs():
                counts += label_counts(pack)
                refs += pack.samples
                for arm in arms:
                    output = self.forward(pack, arm=arm)
                    losses[arm] += output.losses.tolist()
                    if arm == "fused" and output.weights is not None:
                        weights.append(output.weights)
            hits = self._hits(refs)
        each = list(zip(losses["fused"], counts, refs, strict=True))
        by_dataset = {
            name: _mean([(loss, count) for loss, count, ref in each if ref.dataset == name])
            for name in dict.fromkeys(ref.dataset for ref in refs)
        }
        unfused = losses.get("unfused")
        has_floor = bool(hits) and hits[0][1] is not None
        return Evaluation(
            val_loss=_mean(zip(losses["fused"], counts, strict=True)),
            unfused_loss=None if unfused is None else _mean(zip(unfused, counts, strict=True)),
            val_accuracy=sum(fused for fused, _ in hits) / len(hits) if hits else None,
            unfused_accuracy=sum(bool(floor) for _, floor in hits) / len(hits) if has_floor else None,
            gate=gate_statistics(torch.cat(weights)) if weights else None,
            num_samples=len(counts),
            num_answers=len(hits),
            dataset_losses=by_dataset,
            sample_losses=tuple(zip(losses["fused"], unfused or [None] * len(counts), counts, strict=True)),
            hits=tuple(hits),
        )

    def answer_some(self, arm: Arm, count: int) -> int:
        """Generate answers to the first held-out samples, for whoever times it. Returns how many there were."""
        refs = islice((ref for pack in self.packs() for ref in pack.samples), count)
        asked = [self.source.conversation(ref)[:-1] for ref in refs]
        if asked and self._answer is not None:
            with _evaluating(self.forward.model), torch.no_grad():
                self._answer(asked, arm, self.config.max_tokens)
        return len(asked)

    def _hits(self, refs: Sequence[SampleRef]) -> list[tuple[bool, bool | None]]:
        if not self.can_answer:
            return []
        whole = [self.source.conversation(ref) for ref in refs[: self.config.num_answers]]
        asked = [messages[:-1] for messages in whole]
        wanted = [_text_of(messages[-1]) for messages in whole]
        fused = self._answer(asked, "fused", self.config.max_tokens)
        floor = self._answer(asked, "unfused", self.config.max_tokens) if self.config.unfused_floor else None
        return [
            (is_same(said, want), None if floor is None else is_same(floor[i], want))
            for i, (said, want) in enumerate(zip(fused, wanted, strict=True))
        ]


def require_evaluator(evaluator: Evaluator | None) -> Evaluator:
    """Raises ConfigError: there is no held-out data."""
    if evaluator is None:
        raise ConfigError(
            "there is no held-out data to evaluate on", value="val_loader=None", allowed="a val_loader",
            fix="Give the trainer a val_loader, or name val_data_path in the recipe", param="val_data_path",
        )  # fmt: skip
    return evaluator


def check_evaluation(config: TrainConfig, evaluator: Evaluator | None) -> None:
    """Can the run give what the recipe asks of evaluations and of early stopping? Raises ConfigError."""
    if evaluator is None:
        config.require_no_evaluation()
        return
    stopping, num_answers = config.early_stopping, config.evaluation.num_answers
    if stopping is not None and not config.checkpoints.keep_best:
        raise ConfigError(
            "early stopping ends with the best step, which would not be kept", value="checkpoints.keep_best=false",
            allowed="true, with early_stopping", fix="Leave checkpoints.keep_best out, or early_stopping",
            param="checkpoints.keep_best",
        )  # fmt: skip
    if evaluator.can_answer:
        return
    if stopping is not None and stopping.metric == "val_accuracy":
        raise ConfigError(
            "val_accuracy needs generated answers", value=f"num_answers={num_answers}",
            allowed="evaluation.num_answers above 0, and a run that can generate",
            fix="Set evaluation.num_answers, or stop by val_loss", param="early_stopping.metric",
        )  # fmt: skip
    if num_answers:
        raise ConfigError(
            "nothing is given that could generate the answers", value=f"num_answers={num_answers}",
            allowed="0, or hooks with 'answer', as `dve train` and model_core.DualVisionTrainer have them",
            fix="Take model_core.DualVisionTrainer, give hooks=RunHooks(answer=...), or set num_answers to 0",
            param="evaluation.num_answers",
        )  # fmt: skip


def is_same(said: str, wanted: str) -> bool:
    """Do two answers say the same, but for case, punctuation at the ends, articles and spaces?"""
    return _normal(said) == _normal(wanted)


def _normal(text: str) -> str:
    words = re.sub(r"[^\w\s%+-]", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _text_of(message: ChatMessage) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))


def _mean(losses: Iterable[tuple[float, float]]) -> float:
    pairs = list(losses)
    return sum(loss for loss, _ in pairs) / max(1, sum(count for _, count in pairs))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """eval() for every module, and each back to the mode it had."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in was_training.items():
            module.training = mode
