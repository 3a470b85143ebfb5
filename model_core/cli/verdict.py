"""The verdict on a run: is the fused model better than the unfused one on held-out data, how surely, at what price?

In: a trainer whose run has ended; out: differences with 95 % intervals (paired bootstrap over samples), and the
seconds of a forward pass and of a generated answer with and without the fusion. It judges the data it is given and no
other.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from model_core.errors import ConfigError
from model_core.training.config import TrainConfig
from model_core.training.evaluation import Evaluator, require_evaluator

if TYPE_CHECKING:
    from model_core.training.trainer import DualVisionTrainer

#: Generated for the verdict where the recipe's own evaluations generate none.
DEFAULT_ANSWERS = 64
_RESAMPLES = 2000
_TIMED_PACKS = 8
_TIMED_ANSWERS = 32


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, fused less unfused, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """loss: per label token, below 0 is better fused; accuracy: of answers, above 0 is better fused.

    seconds_per_answer: of generated answers, in batches as the evaluation asks them; None where none are generated.
    """

    word: str
    val_loss: float
    unfused_loss: float
    loss: Interval
    accuracy: Interval | None
    num_samples: int
    num_answers: int
    seconds_per_sample: float
    unfused_seconds_per_sample: float
    seconds_per_answer: float | None = None
    unfused_seconds_per_answer: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        lines = [
            f"verdict: {self.word}",
            f"  loss per label token: fused {self.val_loss:.4f}, unfused {self.unfused_loss:.4f}, difference "
            f"{self.loss.value:+.4f} [{self.loss.low:+.4f}, {self.loss.high:+.4f}] over {self.num_samples} samples",
        ]
        if self.accuracy is not None:
            a = self.accuracy
            lines.append(f"  answers: {a.value:+.1%} [{a.low:+.1%}, {a.high:+.1%}] right over {self.num_answers}")
        forward = _cost(self.seconds_per_sample, self.unfused_seconds_per_sample)
        lines.append(f"  cost: {forward} a sample's forward pass")
        if self.seconds_per_answer is not None and self.unfused_seconds_per_answer is not None:
            lines.append(f"  cost: {_cost(self.seconds_per_answer, self.unfused_seconds_per_answer)} an answer")
        return "\n".join(lines)


def require_floor(config: TrainConfig) -> None:
    """Can there be a verdict? To be asked before a run, not after it. Raises ConfigError."""
    if config.val_data_path is None or not config.evaluation.unfused_floor:
        raise ConfigError(
            "a verdict compares fused with unfused on held-out data",
            value=f"val_data_path={config.val_data_path}, unfused_floor={config.evaluation.unfused_floor}",
            allowed="val_data_path and evaluation.unfused_floor=true", fix="Name val_data_path in the recipe",
            param="val_data_path",
        )  # fmt: skip


def verdict(trainer: DualVisionTrainer) -> Verdict:
    """Evaluate once more and judge, with generated answers too. The trainer has held-out data (`require_floor`)."""
    evaluator = _with_answers(require_evaluator(trainer.evaluator))
    found = evaluator.run()
    pairs = [(fused, unfused or 0.0, count) for fused, unfused, count in found.sample_losses]
    loss = bootstrap(pairs, _loss_difference)
    hits = [(fused, floor) for fused, floor in found.hits if floor is not None]
    accuracy = bootstrap(hits, _hit_difference) if hits else None
    seconds = [_seconds(trainer, arm) for arm in ("fused", "unfused")]
    answers = [_answer_seconds(evaluator, arm) for arm in ("fused", "unfused")]
    return Verdict(
        word=word_of(loss, accuracy), val_loss=found.val_loss, unfused_loss=found.unfused_loss or 0.0, loss=loss,
        accuracy=accuracy, num_samples=found.num_samples, num_answers=len(hits), seconds_per_sample=seconds[0],
        unfused_seconds_per_sample=seconds[1], seconds_per_answer=answers[0], unfused_seconds_per_answer=answers[1],
    )  # fmt: skip


def bootstrap(pairs: Sequence[Any], difference: Callable[[Sequence[Any]], float], seed: int = 0) -> Interval:
    """The difference and the 2.5th and 97.5th percentile of it over resampled pairs (Efron 1979)."""
    rng = random.Random(seed)
    resampled = sorted(difference(rng.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    low, high = (resampled[round(share * (_RESAMPLES - 1))] for share in (0.025, 0.975))
    return Interval(difference(pairs), low, high)


def _loss_difference(pairs: Sequence[tuple[float, float, int]]) -> float:
    return sum(fused - unfused for fused, unfused, _ in pairs) / max(1, sum(count for _, _, count in pairs))


def _hit_difference(pairs: Sequence[tuple[bool, bool]]) -> float:
    return sum(fused - floor for fused, floor in pairs) / len(pairs)


def _with_answers(evaluator: Evaluator) -> Evaluator:
    """The run's own, or one that asks for some answers where that asks for none."""
    if evaluator.config.num_answers:
        return evaluator
    asking = copy.copy(evaluator)
    asking.config = evaluator.config.model_copy(update={"num_answers": DEFAULT_ANSWERS})
    return asking


def word_of(loss: Interval, accuracy: Interval | None) -> str:
    """What both intervals say; one that holds 0 says nothing."""
    signs = {"loss": _sign(-loss.high, -loss.low), "answers": _sign(accuracy.low, accuracy.high) if accuracy else 0}
    if len(set(signs.values()) - {0}) == 2:
        better = ", ".join(f"by the {name} {'fused' if sign > 0 else 'unfused'}" for name, sign in signs.items())
        return f"mixed on this data: {better} is better"
    if 1 in signs.values():
        return "fused is better on this data"
    if -1 in signs.values():
        return "unfused is better on this data: do not deploy the fusion"
    return "no difference can be shown on this data"


def _sign(low: float, high: float) -> int:
    return int(low > 0) - int(high < 0)


def _seconds(trainer: DualVisionTrainer, arm: Any) -> float:
    """Of one held-out sample's forward pass, the median of a few packs after one that is not counted."""
    measured = []
    with torch.no_grad():
        for number, pack in enumerate(trainer.evaluator.packs()):
            if number > _TIMED_PACKS:
                break
            begin = time.perf_counter()
            trainer.forward(pack, arm=arm).losses.tolist()  # reading the losses waits for the device
            measured.append((time.perf_counter() - begin) / len(pack.samples))
    counted = sorted(measured[1:] or measured)
    return counted[len(counted) // 2]


def _answer_seconds(evaluator: Evaluator, arm: Any) -> float | None:
    """Of one generated answer: the better of two passes over a few; None where nothing can generate one."""
    passes: list[float] = []
    if not evaluator.can_answer:
        return None
    for _ in range(2):
        begin = time.perf_counter()
        count = evaluator.answer_some(arm, min(_TIMED_ANSWERS, evaluator.config.num_answers))
        passes.append((time.perf_counter() - begin) / max(1, count))
    return min(passes)


def _cost(fused: float, unfused: float) -> str:
    return f"{1000 * fused:.1f} ms, {1000 * unfused:.1f} ms unfused ({fused / unfused:.2f}x)"
