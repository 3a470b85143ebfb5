"""What training minimises: the language loss of a pack, and the gate's own losses with their memory.

In: hidden states and labels, or an (I, E) table of gate weights; out: scalars with gradients. It weighs nothing against
anything and divides by no count: the trainer knows the whole step, these know a pack.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model_core.errors import CheckpointMismatchError, ConfigError, InvalidRequestError
from model_core.training.config import TrainConfig
from model_core.training.freeze import component_of

IGNORE = -100
#: What kept the demo model's gate open, there to the end: its recipe sets `anneal_ratio` null (DECISIONS.md, 2026-11-23
#: and 2026-11-29). A tenth of it did not hold a gate in trials.
DEFAULT_DIVERSITY_LOSS_WEIGHT = 1.0
#: Above this many logits they are never all in memory at once.
_CHUNK_ABOVE_LOGITS = 1 << 26
#: A gate is collapsed where one encoder gets less than this share of every picture, and all get nearly the same.
COLLAPSED_MEAN, COLLAPSED_STD = 0.05, 0.05


def next_token_labels(labels: Tensor, sample_lengths: Sequence[int]) -> Tensor:
    """(S,) -> (S,): at each place the label of the NEXT token of the same sample; -100 at a sample's last."""
    if sum(sample_lengths) != len(labels):
        raise InvalidRequestError(
            "sample lengths do not add up to the pack", value=sum(sample_lengths), allowed=str(len(labels)),
            fix="Let the batch source's sample_lengths count every token of the pack once",
        )  # fmt: skip
    shifted = torch.full_like(labels, IGNORE)
    shifted[:-1] = labels[1:]
    ends = torch.tensor(list(sample_lengths), device=labels.device).cumsum(0) - 1
    return shifted.index_fill(0, ends, IGNORE)


@dataclass(frozen=True)
class LabelRows:
    """The places of a pack from which a label is foretold, in order; there is none at a sample's last token.

    places: (R,) into the pack; targets: (R,) the token that follows each; owners: (R,) the number of its sample, below
    num_samples.
    """

    places: Tensor
    targets: Tensor
    owners: Tensor
    num_samples: int

    @classmethod
    def of(cls, labels: Tensor, sample_lengths: Sequence[int]) -> LabelRows:
        """labels: (S,), the token at each place or -100; the shift by one is made here."""
        targets = next_token_labels(labels, sample_lengths)
        places = (targets != IGNORE).nonzero()[:, 0]
        lengths = torch.tensor(list(sample_lengths), device=labels.device)
        owners = torch.arange(len(lengths), device=labels.device).repeat_interleave(lengths)
        return cls(places, targets[places], owners[places], len(lengths))

    def to(self, device: torch.device) -> LabelRows:
        return LabelRows(self.places.to(device), self.targets.to(device), self.owners.to(device), self.num_samples)


def sample_losses(
    hidden: Tensor, lm_head_weight: Tensor, rows: LabelRows, label_weights: Tensor | None = None
) -> Tensor:
    """Cross entropy summed over each sample's label tokens.

    Args:
        hidden: (R, D) after the final norm, at `rows.places`, on their device; lm_head_weight: (V, D), computed in
            hidden's dtype.
        label_weights: (S,), what each label's loss is multiplied by, at the label's own place.
    Returns:
        (num_samples,) float32. The (R, V) logits of a large vocabulary never exist: they go through torch's chunked
        `linear_cross_entropy`, or a few rows at a time where torch has none.
    """
    each = _token_losses(hidden, lm_head_weight.to(hidden.dtype), rows.targets)
    if label_weights is not None:
        each = each * label_weights.to(hidden.device)[rows.places + 1]
    # A one-hot product instead of a scatter: the same sum every time, on CUDA too; in float32, whatever autocast says.
    with torch.autocast(hidden.device.type, enabled=False):
        return F.one_hot(rows.owners, rows.num_samples).to(each.dtype).T @ each


def _token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(R, D), (V, D), (R,) -> (R,) float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        if len(targets) * len(weight) <= _CHUNK_ABOVE_LOGITS:
            return _plain_losses(hidden, weight, targets)
        chunked = getattr(F, "linear_cross_entropy", None)
        if chunked is not None:
            options = torch.nn.LinearCrossEntropyOptions()
            return chunked(hidden, weight, targets, reduction="none", options=options).float()
        rows = max(1, _CHUNK_ABOVE_LOGITS // len(weight))
        parts = [
            checkpoint(_plain_losses, h, weight, t, use_reentrant=False)
            for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(parts)


def _plain_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")


def encoder_dropout(
    chance: float, num_encoders: int, images_per_sample: Sequence[int], keys: Sequence[str], seed: int
) -> Tensor | None:
    """(I, E) bool of encoders to hide, as an arm does: at most one an image, `chance` in all, split evenly.

    Args:
        keys: one a sample, naming it and the pass over the data, such as `dataset:index:stage:epoch`. The draw is a
            function of seed and key alone, so it is the same in any pack and on any process.
    Returns:
        None where nothing is hidden.
    """
    rows = []
    for count, key in zip(images_per_sample, keys, strict=True):
        for image in range(count):
            digest = hashlib.blake2b(f"{seed}:{key}:{image}".encode(), digest_size=8).digest()
            drawn = int.from_bytes(digest, "big") / 2**64
            hidden = int(drawn / chance * num_encoders) if drawn < chance else None
            rows.append([encoder == hidden for encoder in range(num_encoders)])
    mask = torch.tensor(rows, dtype=torch.bool).view(-1, num_encoders)
    return mask if bool(mask.any()) else None


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp_min(1e-12).log()).sum(-1)


def gate_statistics(weights: Tensor) -> dict[str, Any]:
    """Of (I, E) gate weights: mean and standard deviation by column, mean normalised entropy, `gate_collapsed`."""
    weights = weights.detach().float()
    mean, std = weights.mean(0), weights.std(0, correction=0)
    entropy = float(_entropy(weights).mean()) / math.log(weights.shape[-1])
    collapsed = bool(mean.min() < COLLAPSED_MEAN) and bool(std.max() < COLLAPSED_STD)
    return {"mean": mean.tolist(), "std": std.tolist(), "entropy": entropy, "gate_collapsed": collapsed}


@dataclass(slots=True)
class _Memory:
    """Moving averages over steps: of the mean weight, and of how often each encoder has the largest one."""

    mean: Tensor
    dominant: Tensor
    num_steps: int = 0


class GateLoss:
    """One of the gate's losses, with the averages that it looks back on.

        marginal_kl         KL(mean gate || prior): over many pictures both eyes are used, in one either may win
        mutual_information  log E - (H(mean gate) - mean H(gate)): balanced over all, decided in each
        load_balance        E * sum_e(share won by e * mean weight of e) (2101.03961, section 2.2)
        per_sample_entropy  log E - mean H(gate): pushes EVERY picture to equal weights, and so forbids what a gate
                            is for; for comparison

    marginal_kl holds a gate for as long as it has weight. Where it fades (`anneal_ratio`, by default over 30 % of the
    steps) a gate that would close without it closes later; `anneal_ratio` null holds it to the end, and costs some of
    the language loss (tests/model_core/training/test_gate_training.py).

    The mean is a moving one over steps in value, and this pack's in gradient. Call it on each pack; `end_step` folds
    the step's packs in, once.
    """

    def __init__(self, name: str, weight: float, num_encoders: int, config: TrainConfig) -> None:
        losses = config.losses
        prior = losses.prior or (1 / num_encoders,) * num_encoders
        if len(prior) != num_encoders:
            raise ConfigError(
                "a prior for another number of encoders", value=prior, allowed=f"{num_encoders} shares",
                fix="Give each encoder its share, or leave the prior out for equal ones", param="losses.prior",
            )  # fmt: skip
        self.name, self.weight, self.num_encoders = name, weight, num_encoders
        self._prior, self._decay, self._anneal = torch.tensor(prior), losses.ema_decay, losses.anneal_ratio
        self._progress = 0.0
        self._memory = _Memory(torch.zeros(num_encoders), torch.zeros(num_encoders))
        self._pending = torch.zeros(2 * num_encoders + 1)

    @property
    def scale(self) -> float:
        """The loss's weight now; marginal_kl's falls to 0 over `anneal_ratio` of all steps."""
        if self.name != "marginal_kl" or self._anneal is None:
            return self.weight
        return self.weight * max(0.0, 1 - self._progress / self._anneal)

    def begin_step(self, progress: float) -> None:
        """progress: the share of all steps that is done (`Curriculum.progress`)."""
        self._progress = progress

    def __call__(self, weights: Tensor) -> Tensor:
        """(I, E) -> the weighted loss, a mean over these images: give it the pack's share of the step's images."""
        weights = weights.float()
        wins = F.one_hot(weights.detach().argmax(-1), self.num_encoders).float()
        sums = torch.cat([weights.detach().sum(0), wins.sum(0), weights.new_tensor([len(weights)])])
        self._pending = self._pending.to(weights.device) + sums
        return self.scale * self._unweighted(weights, wins)

    def _unweighted(self, weights: Tensor, wins: Tensor) -> Tensor:
        most = math.log(self.num_encoders)
        if self.name == "per_sample_entropy":
            return most - _entropy(weights).mean()
        batch = weights.mean(0)
        mean = self._moved(self._memory.mean, batch.detach()) + batch - batch.detach()
        if self.name == "marginal_kl":
            return (mean * (mean.clamp_min(1e-12) / self._prior.to(mean.device)).log()).sum()
        if self.name == "mutual_information":
            return most - _entropy(mean) + _entropy(weights).mean()
        return self.num_encoders * (self._moved(self._memory.dominant, wins.mean(0)) * mean).sum()

    def _moved(self, memory: Tensor, now: Tensor) -> Tensor:
        if not self._memory.num_steps:
            return now
        return self._decay * memory.to(now.device) + (1 - self._decay) * now

    def end_step(self, all_reduce: Callable[[Tensor], Tensor] | None = None, *, keep: bool = True) -> None:
        """Fold the step's packs into the averages, or drop them. all_reduce: sums a tensor over processes."""
        if not keep:
            self._pending = torch.zeros_like(self._pending)
            return
        sums = self._pending if all_reduce is None else all_reduce(self._pending)
        count, e = sums[-1].clamp_min(1), self.num_encoders
        if bool(sums[-1] > 0):
            memory = self._memory
            mean, dominant = (
                self._moved(memory.mean, sums[:e] / count),
                self._moved(memory.dominant, sums[e:-1] / count),
            )
            self._memory = _Memory(mean, dominant, memory.num_steps + 1)
        self._pending = torch.zeros_like(self._pending)

    def state_dict(self) -> dict[str, Any]:
        """JSON: float32 goes through a list without loss."""
        memory = self._memory
        return {
            "name": self.name,
            "mean": memory.mean.tolist(),
            "dominant": memory.dominant.tolist(),
            "num_steps": memory.num_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave; of another loss, or for other encoders, it is refused."""
        if state["name"] != self.name or len(state["mean"]) != self.num_encoders:
            raise CheckpointMismatchError(
                "the saved gate loss is another one", value=state["name"], allowed=self.name,
                fix="Resume with the recipe of the run",
            )  # fmt: skip
        self._memory = _Memory(torch.tensor(state["mean"]), torch.tensor(state["dominant"]), int(state["num_steps"]))


def build_gate_loss(model: nn.Module, config: TrainConfig) -> GateLoss | None:
    """The recipe's gate loss; None where there is none to have.

    Raises:
        ConfigError: a loss or a weight is asked for, and this fusion strategy has no gate that learns.
    """
    names = [name for name, _ in model.named_parameters() if component_of(name) == "gate"]
    asked, weight = config.losses.diversity_loss, config.diversity_loss_weight
    if not names:
        if (asked or "none") != "none" or weight or config.losses.prior:
            raise ConfigError(
                "this fusion strategy has no gate, so a gate loss has nothing to act on",
                value=f"{asked or ('diversity_loss_weight' if weight else 'prior')}, {type(model.fusion).__name__}",
                allowed="none and a weight of 0, or fusion gated, gated_residual, token_gated",
                fix="Leave losses.diversity_loss, losses.prior and diversity_loss_weight out",
                param="losses.diversity_loss",
            )  # fmt: skip
        return None
    name, weight = asked or "marginal_kl", DEFAULT_DIVERSITY_LOSS_WEIGHT if weight is None else weight
    if name == "none" or not weight:
        return None
    return GateLoss(name, weight, len(model.fusion.encoder_names), config)
