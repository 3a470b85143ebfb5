"""The verdict on a run: is the fused model better than the unfused one on held-out data, how surely, at what price?

In: a trainer whose run has ended; out: differences with 95 % intervals (paired bootstrap over samples), and the
seconds of an answer's encoders with and without the second one. It judges the data it is given and no other.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from model_core.errors import ConfigError

if TYPE_CHECKING:
    from model_core.training.trainer import DualVisionTrainer

_RESAMPLES = 2000
_TIMED_PACKS = 8


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference, fused less unfused, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """loss: per label token, below 0 is better fused; accuracy: of answers, above 0 is better fused."""

    word: str
    val_loss: float
    unfused_loss: float
    loss: Interval
    accuracy: Interval | None
    num_samples: int
    num_answers: int
    seconds_per_sample: float
    unfused_seconds_per_sample: float

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
        ratio = self.seconds_per_sample / self.unfused_seconds_per_sample
        lines.append(
            f"  cost: {1000 * self.seconds_per_sample:.1f} ms a sample's forward pass, "
            f"{1000 * self.unfused_seconds_per_sample:.1f} ms unfused ({ratio:.2f}x)"
        )
        return "\n".join(lines)


def verdict(trainer: DualVisionTrainer) -> Verdict:
    """Evaluate once more and judge.

    Raises:
        ConfigError: there is no held-out data, or the recipe leaves the unfused floor out.
    """
    if trainer.evaluator is None or not trainer.config.evaluation.unfused_floor:
        raise ConfigError(
            "a verdict compares fused with unfused on held-out data", allowed="val_data_path and unfused_floor=true",
            fix="Name val_data_path in the recipe", param="val_data_path",
        )  # fmt: skip
    found = trainer.evaluate()
    pairs = [(fused, unfused or 0.0, count) for fused, unfused, count in found.sample_losses]
    loss = bootstrap(pairs, _loss_difference)
    hits = [(fused, floor) for fused, floor in found.hits if floor is not None]
    accuracy = bootstrap(hits, _hit_difference) if hits else None
    seconds = [_seconds(trainer, arm) for arm in ("fused", "unfused")]
    return Verdict(
        word=_word(loss), val_loss=found.val_loss, unfused_loss=found.unfused_loss or 0.0, loss=loss,
        accuracy=accuracy, num_samples=found.num_samples, num_answers=len(hits), seconds_per_sample=seconds[0],
        unfused_seconds_per_sample=seconds[1],
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


def _word(loss: Interval) -> str:
    if loss.high < 0:
        return "fused is better on this data"
    if loss.low > 0:
        return "unfused is better on this data: do not deploy the fusion"
    return "no difference can be shown on this data"


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
